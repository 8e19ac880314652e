// OpenMP drivers of the small dense algebra.
#include <algorithm>
#include <cmath>
#include <vector>

#include "drivers.h"
#include "eigh_lanes.h"

namespace lora_kernels {
namespace {

Outcome first_problem(const std::vector<int>& status) {
  for (size_t b = 0; b < status.size(); ++b)
    if (status[b] != kOk) return {status[b], int64_t(b)};
  return {kOk, -1};
}

template <typename T>
struct EighJob {
  using Scalar = T;
  const T* matrices;
  T* values;
  T* vectors;
  int n;
  int* status;

  static int64_t scratch(int64_t n) { return 2 * n * n + 6 * n + 1; }

  template <class L>
  LK_HD void group(int64_t first, int count, typename L::V* a) const {
    using V = typename L::V;
    using Mask = typename L::Mask;
    V *const v = a + n * n, *const d = v + n * n, *const e = d + n, *const tau = e + n, *const p = tau + 2 * n;
    Mask* const active = reinterpret_cast<Mask*>(p + n);
    V scale;
    const Mask finite = load_symmetric<L>(matrices + first * n * n, count, n, a, scale);
    tridiagonalize<L>(a, d, e, tau, p, n);
    accumulate_reflectors<L>(a, tau, p, v, n);
    const Mask stuck = implicit_ql<L>(d, e, v, active, n);
    for (int l = 0; l < count; ++l) status[first + l] = !finite[l] ? kNotFinite : stuck[l] ? kNotConverged : kOk;
    Mask* const rank = active;
    ascending_ranks<L>(d, rank, n);
    fix_signs<L>(v, n);
    for (int l = 0; l < count; ++l) {
      T* const w = values + (first + l) * n;
      T* const z = vectors + (first + l) * n * n;
      for (int j = 0; j < n; ++j) {
        const int64_t k = rank[j][l];
        w[k] = d[j][l] * scale[l];
        for (int i = 0; i < n; ++i) z[i * n + k] = v[j * n + i][l];
      }
    }
  }
};

}  // namespace

template <typename T>
Outcome eigh_cpu(const T* matrices, T* values, T* vectors, int64_t batch, int n, int threads) {
  std::vector<int> status(batch, kOk);
  const EighJob<T> job{matrices, values, vectors, n, status.data()};
  run_lanes(job, batch, job.scratch(n), threads);
  return first_problem(status);
}

template Outcome eigh_cpu<float>(const float*, float*, float*, int64_t, int, int);
template Outcome eigh_cpu<double>(const double*, double*, double*, int64_t, int, int);

}  // namespace lora_kernels
