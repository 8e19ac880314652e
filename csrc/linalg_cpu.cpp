// OpenMP drivers of the small dense algebra.
#include <algorithm>
#include <vector>

#include "eigh_lanes.h"
#include "linalg.h"
#include "solve_lanes.h"

namespace lora_kernels {
namespace {

Outcome first_problem(const std::vector<int>& status) {
  for (size_t b = 0; b < status.size(); ++b)
    if (status[b] != kOk) return {status[b], int64_t(b)};
  return {kOk, -1};
}

template <typename T>
struct EighJob {
  const T* matrices;
  T* values;
  T* vectors;
  int n;
  int* status;

  static int64_t scratch(int64_t n) { return 2 * n * n + n + eigh_scratch(n); }

  template <class L>
  LK_HD void group(int64_t first, int count, typename L::V* a) const {
    using V = typename L::V;
    V *const v = a + n * n, *const d = v + n * n, *const rest = d + n, scale;
    const typename L::Mask finite = load_symmetric<L>(matrices + first * n * n, count, n, a, scale);
    const typename L::Mask stuck = eigh_lanes<L>(a, d, v, rest, n);
    for (int l = 0; l < count; ++l) status[first + l] = !finite[l] ? kNotFinite : stuck[l] ? kNotConverged : kOk;
    typename L::Mask* const rank = reinterpret_cast<typename L::Mask*>(rest);
    ascending_ranks<L>(d, rank, n);
    fix_signs<L>(v, n);
    for (int l = 0; l < count; ++l) {
      T* const w = values + (first + l) * n;
      T* const z = vectors + (first + l) * n * n;
      for (int j = 0; j < n; ++j) {
        const int64_t k = rank[j][l];
        w[k] = T(d[j][l] * scale[l]);
        for (int i = 0; i < n; ++i) z[i * n + k] = T(v[j * n + i][l]);
      }
    }
  }
};

template <typename T, typename Out>
struct CholeskyJob {
  const T* matrices;
  Out* factors;
  double* inverses;  // (batch, n): 1 / diagonal; or null
  int n;
  int* status;

  static int64_t scratch(int64_t n) { return n * n + n; }

  template <class L>
  LK_HD void group(int64_t first, int count, typename L::V* a) const {
    using V = typename L::V;
    V* const inverse = a + n * n;
    const Sources<L, T> sources(matrices + first * n * n, int64_t(n) * n, count);
    V poison = V{};
    for (int i = 0; i < n; ++i)
      for (int j = 0; j <= i; ++j) {
        const V x = sources[i * n + j];
        a[i * n + j] = x;
        poison += x - x;
      }
    const typename L::Mask finite = poison == 0, minor = cholesky_lanes<L>(a, inverse, n);
    for (int l = 0; l < count; ++l) {
      status[first + l] = !finite[l] ? kNotFinite : minor[l] ? kNotPositive + int(minor[l]) - 1 : kOk;
      Out* const factor = factors + (first + l) * n * n;
      for (int i = 0; i < n; ++i)
        for (int j = 0; j < n; ++j) factor[i * n + j] = j <= i ? Out(a[i * n + j][l]) : Out(0);
      for (int i = 0; inverses && i < n; ++i) inverses[(first + l) * n + i] = inverse[i][l];
    }
  }
};

// L L^T x = rhs, one matrix and kBlock columns at a time; lanes are columns here.
template <typename T>
struct SubstituteJob {
  static constexpr int kBlock = 64;
  const double* factors;
  const double* inverses;
  const T* rhs;
  T* out;
  int n;
  int64_t columns;

  int64_t blocks() const { return (columns + kBlock - 1) / kBlock; }
  // Vectors of the narrowest kind, of two columns each, hold n rows of a block.
  static int64_t scratch(int64_t n) { return n * kBlock / lane_count(); }

  template <class L>
  LK_HD void group(int64_t item, int, typename L::V* x) const {
    using V = typename L::V;
    constexpr int kWidth = kBlock / L::count, kStrip = kWidth < 4 ? kWidth : 4;
    const int64_t b = item / blocks(), first = item % blocks() * kBlock;
    const int used = int(std::min<int64_t>(kBlock, columns - first));
    const double* const l = factors + b * n * n;
    const double* const inverse = inverses + b * n;
    const int64_t base = b * n * columns + first;
    double* const flat = reinterpret_cast<double*>(x);
    for (int i = 0; i < n; ++i)
      for (int c = 0; c < kBlock; ++c) flat[i * kBlock + c] = c < used ? double(rhs[base + i * columns + c]) : 0.0;
    for (int strip = 0; strip * L::count < used; strip += kStrip) {
      for (int pass = 0; pass < 2; ++pass) {  // L y = rhs downwards, then L^T x = y upwards
        for (int step = 0; step < n; ++step) {
          const int i = pass ? n - 1 - step : step;
          V sum[kStrip];
          for (int c = 0; c < kStrip; ++c) sum[c] = x[i * kWidth + strip + c];
          for (int j = pass ? i + 1 : 0; j < (pass ? n : i); ++j) {
            const double entry = pass ? l[j * n + i] : l[i * n + j];
            for (int c = 0; c < kStrip; ++c) sum[c] -= entry * x[j * kWidth + strip + c];
          }
          for (int c = 0; c < kStrip; ++c) x[i * kWidth + strip + c] = sum[c] * inverse[i];
        }
      }
    }
    for (int i = 0; i < n; ++i)
      for (int c = 0; c < used; ++c) out[base + i * columns + c] = T(flat[i * kBlock + c]);
  }
};

template <typename T>
struct SylvesterJob {
  const T* p;
  const T* q;
  const T* rhs;
  T* out;
  int r;
  int k;
  int* status;

  static int64_t scratch(int64_t r, int64_t k) {
    const int64_t m = std::max(r, k);
    return m * m + r * r + k * k + r + k + 2 * r * k + eigh_scratch(m);
  }

  template <class L>
  LK_HD void group(int64_t first, int count, typename L::V* a) const {
    using V = typename L::V;
    using Mask = typename L::Mask;
    const int m = std::max(r, k);
    V *const u = a + m * m, *const v = u + r * r, *const dp = v + k * k, *const dq = dp + r, *const x = dq + k;
    V *const y = x + r * k, *const rest = y + r * k, scale_p, scale_q, poison = V{};
    Mask finite = load_symmetric<L>(p + first * r * r, count, r, a, scale_p);
    Mask stuck = eigh_lanes<L>(a, dp, u, rest, r);
    finite &= load_symmetric<L>(q + first * k * k, count, k, a, scale_q);
    stuck |= eigh_lanes<L>(a, dq, v, rest, k);
    const Sources<L, T> sources(rhs + first * r * k, int64_t(r) * k, count);
    for (int e = 0; e < r * k; ++e) {
      x[e] = sources[e];
      poison += x[e] - x[e];
    }
    finite &= poison == 0;
    V largest_p = V{}, largest_q = V{};
    for (int i = 0; i < r; ++i) largest_p = larger<L>(largest_p, magnitude<L>(dp[i] *= scale_p));
    for (int j = 0; j < k; ++j) largest_q = larger<L>(largest_q, magnitude<L>(dq[j] *= scale_q));
    const V zero = sylvester_threshold(largest_p, largest_q, double(Limits<T>::epsilon), m);
    multiply<L>(u, r, 1, x, k, 1, y, r, r, k);  // rows of u and v are eigenvectors
    multiply<L>(y, k, 1, v, 1, k, x, r, k, k);
    for (int i = 0; i < r; ++i)
      for (int j = 0; j < k; ++j) {
        const V sum = dp[i] + dq[j];
        const Mask singular = magnitude<L>(sum) <= zero;
        x[i * k + j] = singular ? V{} : x[i * k + j] / (singular ? splat<L>(1) : sum);
      }
    multiply<L>(u, 1, r, x, k, 1, y, r, r, k);
    multiply<L>(y, k, 1, v, k, 1, x, r, k, k);
    for (int l = 0; l < count; ++l) {
      status[first + l] = !finite[l] ? kNotFinite : stuck[l] ? kNotConverged : kOk;
      for (int e = 0; e < r * k; ++e) out[(first + l) * r * k + e] = T(x[e][l]);
    }
  }
};

struct SingularValuesJob {
  const double* matrices;
  double* values;
  int n;
  int* status;

  static int64_t scratch(int64_t n) { return n * n + 3 * n; }

  template <class L>
  LK_HD void group(int64_t first, int count, typename L::V* a) const {
    using V = typename L::V;
    V *const squares = a + n * n, *const found = squares + n, poison = V{};
    const Sources<L, double> sources(matrices + first * n * n, int64_t(n) * n, count);
    for (int e = 0; e < n * n; ++e) {
      a[e] = sources[e];
      poison += a[e] - a[e];
    }
    const typename L::Mask finite = poison == 0;
    for (int e = 0; e < n * n; ++e) a[e] = finite ? a[e] : V{};
    const typename L::Mask stuck = singular_values_lanes<L>(a, squares, found, n);
    typename L::Mask* const rank = reinterpret_cast<typename L::Mask*>(found + n);
    ascending_ranks<L>(found, rank, n);
    for (int l = 0; l < count; ++l) {
      status[first + l] = !finite[l] ? kNotFinite : stuck[l] ? kNotConverged : kOk;
      for (int i = 0; i < n; ++i) values[(first + l) * n + n - 1 - rank[i][l]] = found[i][l];
    }
  }
};

}  // namespace

template <typename T>
Outcome eigh_cpu(const T* matrices, T* values, T* vectors, int64_t batch, int n, int threads) {
  std::vector<int> status(batch, kOk);
  const EighJob<T> job{matrices, values, vectors, n, status.data()};
  run_groups(job, batch, lane_count(), job.scratch(n), threads);
  return first_problem(status);
}

template <typename T>
Outcome cholesky_cpu(const T* matrices, T* factors, int64_t batch, int n, int threads) {
  std::vector<int> status(batch, kOk);
  const CholeskyJob<T, T> job{matrices, factors, nullptr, n, status.data()};
  run_groups(job, batch, lane_count(), job.scratch(n), threads);
  return first_problem(status);
}

template <typename T>
Outcome cholesky_solve_cpu(const T* matrices, const T* rhs, T* out, int64_t batch, int n, int64_t columns,
                           int threads) {
  std::vector<int> status(batch, kOk);
  std::vector<double> factors(batch * n * n), inverses(batch * n);
  const CholeskyJob<T, double> factor{matrices, factors.data(), inverses.data(), n, status.data()};
  run_groups(factor, batch, lane_count(), factor.scratch(n), threads);
  const Outcome outcome = first_problem(status);
  if (outcome.status != kOk) return outcome;
  const SubstituteJob<T> substitute{factors.data(), inverses.data(), rhs, out, n, columns};
  run_groups(substitute, batch * substitute.blocks(), 1, substitute.scratch(n), threads);
  return outcome;
}

template <typename T>
Outcome sylvester_cpu(const T* p, const T* q, const T* rhs, T* out, int64_t batch, int r, int k, int threads) {
  std::vector<int> status(batch, kOk);
  const SylvesterJob<T> job{p, q, rhs, out, r, k, status.data()};
  run_groups(job, batch, lane_count(), job.scratch(r, k), threads);
  return first_problem(status);
}

Outcome singular_values_cpu(const double* matrices, double* values, int64_t batch, int n, int threads) {
  std::vector<int> status(batch, kOk);
  const SingularValuesJob job{matrices, values, n, status.data()};
  run_groups(job, batch, lane_count(), job.scratch(n), threads);
  return first_problem(status);
}

#define LK_INSTANTIATE(T)                                                               \
  template Outcome eigh_cpu<T>(const T*, T*, T*, int64_t, int, int);                    \
  template Outcome cholesky_cpu<T>(const T*, T*, int64_t, int, int);                    \
  template Outcome cholesky_solve_cpu<T>(const T*, const T*, T*, int64_t, int, int64_t, int); \
  template Outcome sylvester_cpu<T>(const T*, const T*, const T*, T*, int64_t, int, int, int);
LK_INSTANTIATE(float)
LK_INSTANTIATE(double)

}  // namespace lora_kernels
