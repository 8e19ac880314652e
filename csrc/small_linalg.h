// Batched algebra on small matrices: what the CPU (lanes.h, *_lanes.h) and the GPU (*.cu) have in common.
//
// The loops differ, because the CPU gives a matrix a vector lane and the GPU gives it a block of threads. Shared are
// the outcomes, the Jacobi rotation and all thresholds. What they run:
//   eigenpairs       CPU tridiagonalisation and implicit QL (eigh_lanes.h), GPU two-sided Jacobi (cuda.cu)
//   Cholesky         CPU left-looking (solve_lanes.h), GPU right-looking (linalg_cuda.cu)
//   Sylvester        both: eigenpairs, rotate, divide, rotate back
//   singular values  both: one-sided Jacobi; the CPU takes pairs in order, the GPU disjoint ones at once
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

// What an algorithm computes with, in place of the vectors of lanes.h: one number.
template <typename T>
struct Scalar {
  using V = T;
  using Mask = bool;
  static LK_HD T root(T x) { return std::sqrt(x); }
  static LK_HD T inverse_root(T x) {
#if defined(__CUDA_ARCH__)
    return rsqrt(x);  // no division subroutine, hence no stack
#else
    return T(1) / std::sqrt(x);
#endif
  }
};

// A rotation [c s; -s c] as its sine, its tangent and tau = s / (1 + c), with which it is applied as a correction: the
// rounding of a small rotation is then small too, and lengths do not drift over the hundreds that a row goes through
// (Rutishauser 1966; Golub and Van Loan, section 8.5).
template <class L>
struct Rotation {
  typename L::V s, t, tau;
  LK_HD typename L::V first(const typename L::V& x, const typename L::V& y) const { return x - s * (y + tau * x); }
  LK_HD typename L::V second(const typename L::V& x, const typename L::V& y) const { return y + s * (x - tau * y); }
};

// The rotation that annihilates the entry a_pq of [a_pp a_pq; a_pq a_qq]; the identity where `skip`, which must hold
// where a_pq = 0. A slope whose square overflows gives the identity as well, and then a_pq is beyond rounding beside
// the diagonal.
template <class L>
LK_HD Rotation<L> jacobi_rotation(const typename L::V& app, const typename L::V& aqq, const typename L::V& apq,
                                  const typename L::Mask& skip) {
  using V = typename L::V;
  const V one = V{} + 1;
  const V slope = (aqq - app) / (2 * (skip ? one : apq));
  const V root = L::root(slope * slope + 1);
  const V t = skip ? V{} : 1 / (slope + (slope < 0 ? -root : root));
  const V c = L::inverse_root(t * t + 1);
  return {t * c, t, t * c / (1 + c)};
}

// Sum of squares off the diagonal at which a matrix of squared Frobenius norm `total` counts as diagonal.
template <typename T>
LK_HD T jacobi_threshold(T total, int n) {
  const T relative = Limits<T>::epsilon * T(n);
  return relative * relative * total * T(0.0625);
}

// Round-robin tournament of the GPU: in round r of `players - 1`, pair k < players / 2 meets; all pairs of a
// round are disjoint.
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
