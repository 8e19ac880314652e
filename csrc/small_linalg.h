// Batched algebra on small matrices: what the CPU (lanes.h, *_lanes.h) and the GPU (*.cu) have in common.
//
// The loops differ, because the CPU gives a matrix a vector lane and the GPU gives it a block of threads; rotations,
// pair schedule, thresholds and outcomes are shared.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define LK_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define LK_HD inline __attribute__((always_inline))
#else
#define LK_HD inline
#endif

namespace lora_kernels {

// kNotPositive + k: the leading minor of order k + 1 is the first that is not positive.
enum Status : int { kOk = 0, kNotFinite = 1, kNotConverged = 2, kNotPositive = 3 };

constexpr int kMaxSweeps = 40;

template <typename T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float epsilon = 1.1920929e-07f;
};
template <>
struct Limits<double> {
  static constexpr double epsilon = 2.220446049250313e-16;
};

template <typename T>
LK_HD T inverse_sqrt(T x) {
#if defined(__CUDA_ARCH__)
  return rsqrt(x);  // no division subroutine, hence no stack
#else
  return T(1) / std::sqrt(x);
#endif
}

// The rotation [c s; -s c] that annihilates the entry a_pq of [a_pp a_pq; a_pq a_qq]. Without branches, so that it
// vectorises; a_pq = 0 gives the identity.
template <typename T>
LK_HD void jacobi_rotation(T app, T aqq, T apq, T& c, T& s) {
  const bool skip = apq == T(0);
  const T theta = (aqq - app) / (T(2) * (skip ? T(1) : apq));
  const T sign = theta < T(0) ? T(-1) : T(1);
  const T magnitude = theta * sign;
  // theta^2 overflows for a huge theta, where t = 1 / (2 theta) is exact to rounding.
  const bool huge = magnitude > T(1e15);
  const T bounded = huge ? T(1) : magnitude;
  const T near = sign / (bounded + std::sqrt(bounded * bounded + T(1)));
  const T far = sign / (T(2) * (huge ? magnitude : T(1)));
  const T t = skip ? T(0) : (huge ? far : near);
  c = inverse_sqrt(t * t + T(1));
  s = t * c;
}

// Sum of squares off the diagonal at which a matrix of squared Frobenius norm `total` counts as diagonal.
template <typename T>
LK_HD T jacobi_threshold(T total, int n) {
  const T relative = Limits<T>::epsilon * T(n);
  return relative * relative * total * T(0.0625);
}

// Round-robin tournament: in round r of `players - 1`, pair k < players / 2 meets; all pairs of a round are disjoint.
LK_HD void tournament_pair(int players, int round, int k, int& p, int& q) {
  const int cycle = players - 1;
  const int a = (round + k) % cycle;
  const int b = k == 0 ? cycle : (round - k + cycle) % cycle;
  p = a < b ? a : b;
  q = a < b ? b : a;
}

// One-sided Jacobi: whether two rows of length n, with squared norms xx and yy and product xy, need no rotation. A row
// whose square is below `noise` is a null direction up to rounding. For scalars and for vectors of lanes.
template <class V, typename T>
LK_HD auto orthogonal(const V& xx, const V& yy, const V& xy, const V& noise, T epsilon, int n) {
  return (xy * xy <= epsilon * epsilon * T(n) * xx * yy) | (xx <= noise) | (yy <= noise);
}

// The squared norm at which a row counts as null beside a matrix of squared Frobenius norm `total`.
template <class V, typename T>
LK_HD V null_square(const V& total, T epsilon) {
  return epsilon * epsilon * T(1e-6) * total;
}

// P X + X Q = R: a sum of eigenvalues p_i + q_j up to this is zero, and so is the coefficient behind it, which gives
// the solution of least norm. p, q: largest magnitudes of the eigenvalues; n: the larger of the two orders.
template <class V, typename T>
LK_HD V sylvester_threshold(const V& p, const V& q, T epsilon, int n) {
  return epsilon * T(n) * (p + q);
}

}  // namespace lora_kernels
