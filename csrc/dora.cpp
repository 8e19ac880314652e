// DoRA on the CPU: rows of W + B A, and the gradients of products that are rescaled by row.
//
// A sum runs in an order that depends on the shape alone: not on threads.
#include <algorithm>

#include "drivers.h"
#include "lora_lanes.h"
#include "lora_tasks.h"

namespace lora_kernels {
namespace {

// A task is as many rows as the largest tile has.
template <class X>
struct SumJob : DoraSum {
  static constexpr int64_t kStrip = 48;  // of the widest vectors; a multiple of all strips
  float* tail;                           // the last columns of a, and zeros behind them: (rank, kStrip)

  int64_t whole() const { return columns / kStrip * kStrip; }
  int64_t scratch() const { return round_up(rank * 8, 16) + 16 * kStrip; }

  template <class W>
  LK_HD void prepare(int64_t) const {
    for (int64_t j = 0; j < rank; ++j)
      for (int64_t c = 0; c < kStrip; ++c)
        tail[j * kStrip + c] = whole() + c < columns ? a[j * columns + whole() + c] : 0.0f;
  }

  template <class W, int M>
  LK_HD void tile(int64_t row, float* scratch) const {
    using F = typename W::F;
    constexpr int V = W::kVectors;
    constexpr int64_t strip = V * W::lanes;
    float* const columns_of_b = scratch;
    float* const last = scratch + round_up(rank * 8, 16);
    for (int64_t j = 0; j < rank; ++j)
      for (int m = 0; m < M; ++m) columns_of_b[j * M + m] = b[(row + m) * rank + j];
    const auto add = [&](const float* factor, int64_t factor_stride, const auto* from, int64_t stride, float* to,
                         int64_t to_stride) __attribute__((always_inline)) {
      F sum[M][V];
      outer_tile<W, M, V, false>(columns_of_b, M, factor, factor_stride, rank, nullptr, 0, 0, sum);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
          store(to + m * to_stride + v * W::lanes, sum[m][v] + load_float<W>(from + m * stride + v * W::lanes));
    };
    const X* const from = static_cast<const X*>(w) + row * w_stride;
    float* const to = out + row * columns;
    const int64_t rest = columns - whole();
    for (int64_t c = 0; c < whole(); c += strip) add(a + c, columns, from + c, w_stride, to + c, columns);
    if (rest == 0) return;
    for (int m = 0; m < M; ++m)
      for (int64_t c = 0; c < kStrip; ++c)
        last[m * kStrip + c] = c < rest ? widen(from[m * w_stride + whole() + c]) : 0.0f;
    float* const sums = last + 8 * kStrip;
    for (int64_t c = 0; c < kStrip; c += strip) add(tail + c, kStrip, last + c, kStrip, sums + c, kStrip);
    for (int m = 0; m < M; ++m) std::copy_n(sums + m * kStrip, rest, to + m * columns + whole());
  }

  template <class W>
  LK_HD void work(int64_t item, float* scratch) const {
    const int64_t first = item * 8, end = std::min(rows, first + 8);
    for (int64_t row = first; row < end; row += W::kTile)
      with_constant<W::kTile>(int(std::min<int64_t>(W::kTile, end - row)), [&](auto count)
                                                                              __attribute__((always_inline)) {
        tile<W, decltype(count)::value>(row, scratch);
      });
  }
};

// A task is a block of rows, whose sums by column go to memory, a few rows at a time.
template <class X>
struct RescaledJob : RescaledBackward {
  static constexpr int64_t kRows = 32, kTogether = 4;
  float* partial;  // (blocks, columns) of sums

  int64_t blocks() const { return ceil_div(rows, kRows); }
  int64_t scratch() const { return 0; }
  template <class W>
  LK_HD void prepare(int64_t) const {}

  // `count` columns of R rows from c on, at most a vector.
  template <class W, int R>
  LK_HD void vector(const X* product_row, const X* g_row, X* d_row, float* sums, int64_t c, int64_t count) const {
    using F = typename W::F;
    const bool whole = count == W::lanes;
    float narrow[2][W::lanes] = {};  // scale and inner of the last columns
    X ragged[W::lanes];
    const auto read = [&](const X* from) __attribute__((always_inline)) {
      if (whole) return load_float<W>(from);
      for (int64_t l = 0; l < W::lanes; ++l) ragged[l] = l < count ? from[l] : X{};
      return load_float<W>(ragged);
    };
    const auto row_of = [&](const float* from, float* copy) __attribute__((always_inline)) {
      if (!from) return F{};
      if (whole) return load<F>(from + c);
      for (int64_t l = 0; l < count; ++l) copy[l] = from[c + l];
      return load<F>(copy);
    };
    const F by = row_of(scale, narrow[0]), shift = row_of(inner, narrow[1]);
    F sum{};
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const F g = read(g_row + i * g_stride + c);
      if (sums) sum += g * (read(product_row + i * columns + c) - shift);
      if (!d_product) continue;
      X* const to = d_row + i * columns + c;
      store_float<W>(whole ? to : ragged, g * by);
      for (int64_t l = 0; !whole && l < count; ++l) to[l] = ragged[l];
    }
    if (!sums) return;
    for (int64_t l = 0; !whole && l < count; ++l) sums[c + l] += sum[l];
    if (whole) store(sums + c, load<F>(sums + c) + sum);
  }

  template <class W>
  LK_HD void work(int64_t block, float*) const {
    const int64_t first = block * kRows, end = std::min(rows, first + kRows);
    float* const sums = out ? partial + block * columns : nullptr;
    if (sums) std::fill_n(sums, columns, 0.0f);
    for (int64_t row = first; row < end; row += kTogether)
      with_constant<kTogether>(int(std::min(kTogether, end - row)), [&](auto count) __attribute__((always_inline)) {
        const X* const product_row = static_cast<const X*>(product) + row * columns;
        const X* const g_row = static_cast<const X*>(g) + row * g_stride;
        X* const d_row = static_cast<X*>(d_product) + row * columns;
        for (int64_t c = 0; c < columns; c += W::lanes)
          vector<W, decltype(count)::value>(product_row, g_row, d_row, sums, c,
                                            std::min<int64_t>(W::lanes, columns - c));
      });
  }
};

template <class X>
void sum(const DoraSum& job, int threads) {
  const Arena tail(size_t(job.rank * SumJob<X>::kStrip) * sizeof(float), 1);
  const SumJob<X> one{job, static_cast<float*>(tail.part(0))};
  Phases phases;
  phases.add(1, one, 1, ceil_div(one.rows, 8), one.rows * one.columns * (one.rank + 1));
  phases.run(threads);
}

template <class X>
void rescaled(const RescaledBackward& job, int threads) {
  RescaledJob<X> one{job, nullptr};
  const Arena partial(size_t(job.out ? one.blocks() * job.columns : 0) * sizeof(float), 1);
  one.partial = static_cast<float*>(partial.part(0));
  Phases phases;
  phases.add(1, one, 0, one.blocks(), job.rows * job.columns * 8);  // bound by memory, not by products
  phases.run(threads);
  if (!job.out) return;
  std::fill_n(job.out, job.columns, 0.0f);
  for (int64_t block = 0; block < one.blocks(); ++block)
    for (int64_t c = 0; c < job.columns; ++c) job.out[c] += one.partial[block * job.columns + c];
}

}  // namespace

void dora_sum(const DoraSum& job, int threads) {
  job.bfloat16 ? sum<BFloat16>(job, threads) : sum<float>(job, threads);
}
void rescaled_backward(const RescaledBackward& job, int threads) {
  job.bfloat16 ? rescaled<BFloat16>(job, threads) : rescaled<float>(job, threads);
}

}  // namespace lora_kernels
