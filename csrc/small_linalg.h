// Batched algebra on small matrices, as templates for host and device.
//
// Symmetric eigenproblem by cyclic Jacobi rotations (Golub and Van Loan, Matrix Computations, section 8.5). The host
// works on LANES matrices at once, one per vector lane, so that every operation is a full-width vector operation; the
// device gives each matrix a block of threads. Rotation, pair schedule and stopping rule are shared.
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

enum Status : int { kOk = 0, kNotFinite = 1, kNotConverged = 2 };

constexpr int kMaxSweeps = 40;

template <typename T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float epsilon = 1.1920929e-07f;
  static constexpr int least_exponent = -125;  // of a normal power of two with a finite inverse
};
template <>
struct Limits<double> {
  static constexpr double epsilon = 2.220446049250313e-16;
  static constexpr int least_exponent = -1021;
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

}  // namespace lora_kernels
