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

// Eigenpairs of LANES symmetric matrices stored lane-innermost: a[(row * n + column) * LANES + lane], both triangles.
// On return the diagonal of a holds the eigenvalues (unsorted) and the columns of v the eigenvectors.
// Returns the number of sweeps, or kMaxSweeps + 1 if a lane did not converge.
template <typename T, int LANES>
LK_HD int jacobi_lanes(T* __restrict__ a, T* __restrict__ v, int n, T* __restrict__ off) {
  for (int i = 0; i < n * n * LANES; ++i) v[i] = T(0);
  for (int i = 0; i < n; ++i)
    for (int l = 0; l < LANES; ++l) v[(i * n + i) * LANES + l] = T(1);
  T threshold[LANES];
  for (int l = 0; l < LANES; ++l) threshold[l] = T(0);
  for (int i = 0; i < n * n; ++i)
    for (int l = 0; l < LANES; ++l) threshold[l] += a[i * LANES + l] * a[i * LANES + l];
  for (int l = 0; l < LANES; ++l) threshold[l] = jacobi_threshold(threshold[l], n);
  for (int sweep = 0; sweep <= kMaxSweeps; ++sweep) {
    for (int l = 0; l < LANES; ++l) off[l] = T(0);
    for (int p = 1; p < n; ++p)
      for (int q = 0; q < p; ++q)
        for (int l = 0; l < LANES; ++l) off[l] += T(2) * a[(p * n + q) * LANES + l] * a[(p * n + q) * LANES + l];
    bool done = true;
    for (int l = 0; l < LANES; ++l) done = done && off[l] <= threshold[l];
    if (done) return sweep;
    for (int p = 0; p < n - 1; ++p) {
      for (int q = p + 1; q < n; ++q) {
        T c[LANES], s[LANES];
        T* const row_p = a + p * n * LANES;
        T* const row_q = a + q * n * LANES;
#pragma GCC ivdep
        for (int l = 0; l < LANES; ++l) {
          const T app = row_p[p * LANES + l], aqq = row_q[q * LANES + l], apq = row_p[q * LANES + l];
          jacobi_rotation(app, aqq, apq, c[l], s[l]);
          const T t = s[l] / c[l];
          row_p[p * LANES + l] = app - t * apq;
          row_q[q * LANES + l] = aqq + t * apq;
          row_p[q * LANES + l] = T(0);
          row_q[p * LANES + l] = T(0);
        }
        for (int k = 0; k < n; ++k) {
          if (k == p || k == q) continue;
#pragma GCC ivdep
          for (int l = 0; l < LANES; ++l) {
            const T x = row_p[k * LANES + l], y = row_q[k * LANES + l];
            const T xx = c[l] * x - s[l] * y, yy = s[l] * x + c[l] * y;
            row_p[k * LANES + l] = xx;
            row_q[k * LANES + l] = yy;
            a[(k * n + p) * LANES + l] = xx;
            a[(k * n + q) * LANES + l] = yy;
          }
        }
        // v is kept transposed (row i holds eigenvector i) so that a rotation touches two contiguous rows.
        for (int k = 0; k < n * LANES; k += LANES) {
#pragma GCC ivdep
          for (int l = 0; l < LANES; ++l) {
            const T x = v[p * n * LANES + k + l], y = v[q * n * LANES + k + l];
            v[p * n * LANES + k + l] = c[l] * x - s[l] * y;
            v[q * n * LANES + k + l] = s[l] * x + c[l] * y;
          }
        }
      }
    }
  }
  return kMaxSweeps + 1;
}

}  // namespace lora_kernels
