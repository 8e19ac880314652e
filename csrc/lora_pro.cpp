// The Adam moments of a layer's full gradient under LoRA-Pro on the CPU: one pass over them. A tile of the gradient is
// made in registers, both moments are updated, and the tile of the direction is contracted while it is in the
// first-level cache.
//
// A result's sums run in an order that depends on the shape alone: not on threads.
#include <algorithm>
#include <cmath>

#include "drivers.h"
#include "lora_lanes.h"
#include "lora_tasks.h"

namespace lora_kernels {
namespace {

template <class W>
LK_HD typename W::F square_root(const typename W::F& x) {
  typename W::F y;
#if LK_X86_ASM
  // GCC takes roots of a vector's lanes one by one.
  if constexpr (W::bytes >= 32 && sizeof(typename W::S) == 4) {
    __asm__("vsqrtps %1, %0" : "=v"(y) : "v"(x));
    return y;
  }
  if constexpr (W::bytes >= 32 && sizeof(typename W::S) == 8) {
    __asm__("vsqrtpd %1, %0" : "=v"(y) : "v"(x));
    return y;
  }
#endif
  for (int l = 0; l < W::lanes; ++l) y[l] = std::sqrt(x[l]);
  return y;
}

// A task is a part of the rows and a part of the columns. It owns its columns of the sums over its rows, and its rows
// of the sums over its columns; parts are added up afterwards.
template <class X, class T>
struct ProJob : LoraProAdam {
  static constexpr int64_t kRows = 16;    // whose tile of the direction is kept
  static constexpr int64_t kChunk = 192;  // strips of all vector widths fill it, and its random bits fill vectors
  static constexpr bool kStochastic = sizeof(X) < sizeof(T);

  MaskSource source[2];
  void* table[2];             // of random bits
  int64_t row_parts, column_parts;
  int64_t panel;              // columns whose part of the factors fits the second-level cache, a multiple of kChunk
  T *bt_h_parts, *h_at_parts;  // (row_parts, rank, columns), (column_parts, rows, rank)

  int64_t first_row(int64_t part) const {
    return std::min(rows, part * ceil_div(rows, kRows) / row_parts * kRows);
  }
  int64_t first_column(int64_t part) const {
    return std::min(columns, part * ceil_div(columns, panel) / column_parts * panel);
  }

  // Scratch memory, in elements from its start. Vectors of 64 bytes start on lines of their own.
  int64_t right() const { return 0; }                                        // [grad_a; a] by strips, ranks
  int64_t packed() const { return right() + 2 * rank * panel; }              // a by tiles, vectors
  int64_t sums() const { return packed() + rank * panel; }                   // of rows: (rank, panel)
  int64_t direction() const { return sums() + rank * panel; }                // (kRows, panel)
  int64_t left() const { return direction() + kRows * panel; }               // [b, grad_b]: (kRows / 8, 2 rank, 8)
  int64_t lanes() const { return left() + 2 * round_up(rank * kRows, 16); }  // of sums of columns: (kRows, rank)
  int64_t totals() const { return lanes() + round_up(kRows * rank, 16) * 16; }
  int64_t ragged() const { return totals() + round_up(kRows * rank, 16); }  // moments past the last column
  int64_t random() const { return ragged() + 2 * 8 * 48; }                  // 16 bits each
  int64_t scratch() const {  // in floats
    return (random() + (kStochastic ? 8 * kChunk : 0)) * int64_t(sizeof(T) / sizeof(float));
  }

  template <class W>
  LK_HD void prepare(int64_t chunk) const {
    if constexpr (kStochastic)
      for (int moment = 0; moment < 2; ++moment)
        source[moment].fill_table<W>(table[moment], chunk * kChunk, std::min(columns, (chunk + 1) * kChunk));
  }

  // Columns first .. last - 1 of the factors with n columns, zeros behind them.
  template <class W>
  LK_HD void pack(int64_t first, int64_t last, T* scratch) const {
    constexpr int64_t strip = W::kVectors * W::lanes;
    const T* const from[2] = {static_cast<const T*>(grad_a), static_cast<const T*>(a)};
    const int64_t stride[2] = {grad_a_stride, a_stride};
    const int64_t width = round_up(last - first, strip), vectors = width / W::lanes;
    T* out = scratch + right();
    for (int64_t c = first; c < first + width; c += strip)
      for (int side = 0; side < 2; ++side)
        for (int64_t j = 0; j < rank; ++j, out += strip) copy(from[side] + j * stride[side] + c, last - c, strip, out);
    const Tiles tiles(rank, W::kTile);
    out = scratch + packed();
    for (int64_t tile = 0; tile < tiles.count; ++tile)
      for (int64_t k = 0; k < vectors; ++k)
        for (int64_t j = tiles.first(tile); j < tiles.first(tile + 1); ++j, out += W::lanes) {
          const int64_t c = first + k * W::lanes;
          copy(from[1] + j * stride[1] + c, last - c, W::lanes, out);
        }
    std::fill_n(scratch + sums(), rank * panel, T(0));
  }
  static LK_HD void copy(const T* from, int64_t used, int64_t width, T* to) {
    if (used >= width) {
      for (int64_t c = 0; c < width; ++c) to[c] = from[c];
    } else {
      for (int64_t c = 0; c < width; ++c) to[c] = c < used ? from[c] : T(0);
    }
  }

  // The numbers of a step, one per lane: read anew after every store if they stayed where they are.
  template <class W>
  struct Numbers {
    typename W::F beta1, rest1, beta2, rest2, avg, root, eps;
    explicit LK_HD Numbers(const ProJob& job) {
      const typename W::F zero = {};
      beta1 = zero + T(job.beta1);
      rest1 = zero + T(1 - job.beta1);
      beta2 = zero + T(job.beta2);
      rest2 = zero + T(1 - job.beta2);
      avg = zero + T(job.avg_factor);
      root = zero + T(job.root_factor);
      eps = zero + T(job.eps);
    }
  };

  // Updates both moments of one vector from its gradient; the direction.
  template <class W>
  static LK_HD typename W::F update(X* avg, X* square, const typename W::F& e, const uint16_t* bits,
                                    const Numbers<W>& by) {
    using F = typename W::F;
    const F m = load_float<W>(avg) * by.beta1 + e * by.rest1;
    const F v = load_float<W>(square) * by.beta2 + e * e * by.rest2;
    if constexpr (kStochastic) {
      store_stochastic<W>(avg, m, bits);
      store_stochastic<W>(square, v, bits + 8 * kChunk);
    } else {
      store(avg, m);
      store(square, v);
    }
    return m * by.avg / (square_root<W>(v) * by.root + by.eps);
  }

  // M rows, columns first .. last - 1: to `h`, whose rows are `panel` long.
  template <class W, int M>
  LK_HD void tile_rows(int64_t row, int64_t first, int64_t last, const T* left, T* h, T* scratch) const {
    using F = typename W::F;
    constexpr int V = W::kVectors;
    constexpr int64_t strip = V * W::lanes;
    uint16_t* const bits = reinterpret_cast<uint16_t*>(scratch + random());
    X* const spare = reinterpret_cast<X*>(scratch + ragged());
    const Numbers<W> numbers(*this);
    for (int64_t chunk = first; chunk < last; chunk += kChunk) {
      const int64_t end = std::min(last, chunk + kChunk);
      if constexpr (kStochastic)
        for (int moment = 0; moment < 2; ++moment)
          for (int m = 0; m < M; ++m)
            source[moment].draw<Wide<W::bytes>>(table[moment], row_offset + row + m, chunk, end,
                                                bits + (moment * 8 + m) * kChunk);
      for (int64_t c = chunk; c < end; c += strip) {
        const int64_t used = std::min(strip, end - c);
        X* const whole[2] = {static_cast<X*>(exp_avg) + row * avg_stride + c,
                             static_cast<X*>(exp_avg_sq) + row * square_stride + c};
        const int64_t stride[2] = {avg_stride, square_stride};
        // The moments arrive while the gradient is made.
        for (int moment = 0; moment < 2; ++moment)
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m)
            for (int64_t l = 0; l < used; l += 64 / int64_t(sizeof(X)))
              __builtin_prefetch(whole[moment] + m * stride[moment] + l, 1);
        F e[M][V];
        outer_tile<W, M, V, false>(left, M, scratch + right() + (c - first) * 2 * rank, strip, 2 * rank, nullptr, 0, 0,
                                   e);
        if (used < strip)
          for (int moment = 0; moment < 2; ++moment)
            for (int m = 0; m < M; ++m)
              for (int64_t l = 0; l < strip; ++l)
                spare[(moment * M + m) * strip + l] = l < used ? whole[moment][m * stride[moment] + l] : X{};
        X* const avg = used < strip ? spare : whole[0];
        X* const square = used < strip ? spare + M * strip : whole[1];
        const int64_t avg_step = used < strip ? strip : stride[0], square_step = used < strip ? strip : stride[1];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) {
            const int64_t l = v * W::lanes;
            store(h + m * panel + (c - first) + l, update<W>(avg + m * avg_step + l, square + m * square_step + l,
                                                             e[m][v], bits + m * kChunk + (c - chunk) + l, numbers));
          }
        if (used < strip)
          for (int moment = 0; moment < 2; ++moment)
            for (int m = 0; m < M; ++m)
              for (int64_t l = 0; l < used; ++l)
                whole[moment][m * stride[moment] + l] = spare[(moment * M + m) * strip + l];
      }
    }
  }

  // sums += b^T h over a block of rows
  template <class W>
  LK_HD void add_rows(int64_t row, int64_t count, int64_t width, const T* h, T* sums) const {
    constexpr int V = W::kVectors;
    const Tiles tiles(rank, W::kTile);
    for (int64_t c = 0; c < width; c += V * W::lanes)
      for (int64_t tile = 0; tile < tiles.count; ++tile) {
        const int64_t j = tiles.first(tile);
        with_constant<W::kTile>(int(tiles.first(tile + 1) - j), [&](auto ranks) __attribute__((always_inline)) {
          constexpr int M = decltype(ranks)::value;
          typename W::F sum[M][V];
          const T* const factor = static_cast<const T*>(b) + row * b_stride + j;
          outer_tile<W, M, V, false>(factor, b_stride, h + c, panel, count, nullptr, 0, 0, sum);
          for (int m = 0; m < M; ++m)
            for (int v = 0; v < V; ++v) {
              T* const to = sums + (j + m) * panel + c + v * W::lanes;
              store(to, load<typename W::F>(to) + sum[m][v]);
            }
        });
      }
  }

  // out (+)= scale * h a^T over a panel of columns
  template <class W>
  LK_HD void add_columns(int64_t count, int64_t width, const T* h, T* scratch, T* out, bool fresh) const {
    const int64_t vectors = width / W::lanes;
    const Tiles tiles(rank, W::kTile);
    T* const sum = scratch + lanes();
    T* const total = scratch + totals();
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const int64_t j = tiles.first(tile);
      const T* const factor = scratch + packed() + j * vectors * W::lanes;
      with_constant<W::kTile>(int(tiles.first(tile + 1) - j), [&](auto ranks) __attribute__((always_inline)) {
        for (int64_t i = 0; i < count; i += 3)
          with_constant<3>(int(std::min<int64_t>(3, count - i)), [&](auto block) __attribute__((always_inline)) {
            inner_tile<W, decltype(block)::value, decltype(ranks)::value>(
                h + i * panel, panel, factor, vectors, sum + (i * rank + j) * W::lanes, rank * W::lanes, true);
          });
      });
    }
    for (int64_t s = 0; s < count * rank; s += W::lanes)
      store(total + s, lane_sums<W>(sum + s * W::lanes) * T(scale));
    for (int64_t s = 0; s < count * rank; ++s) out[s] = fresh ? total[s] : out[s] + total[s];
  }

  // The left factors of a block of rows, row after row within a tile.
  template <class W>
  LK_HD void pack_left(int64_t row, int64_t count, T* out) const {
    const T* const from[2] = {static_cast<const T*>(b), static_cast<const T*>(grad_b)};
    const int64_t stride[2] = {b_stride, grad_b_stride};
    for (int64_t i = 0; i < count; i += W::kTile) {
      const int64_t tile = std::min<int64_t>(W::kTile, count - i);
      for (int side = 0; side < 2; ++side)
        for (int64_t j = 0; j < rank; ++j)
          for (int64_t m = 0; m < tile; ++m) *out++ = from[side][(row + i + m) * stride[side] + j] * T(scale);
    }
  }

  template <class FLOATS>
  LK_HD void work(int64_t item, float* memory) const {
    using W = Wide<FLOATS::bytes, T>;
    T* const scratch = reinterpret_cast<T*>(memory);
    const int64_t row_part = item / column_parts, column_part = item % column_parts;
    const int64_t top = first_row(row_part), bottom = first_row(row_part + 1);
    const int64_t begin = first_column(column_part), end = first_column(column_part + 1);
    T* const h = scratch + direction();
    T* const to = bt_h_parts + row_part * rank * columns;
    for (int64_t first = begin; first < end; first += panel) {
      const int64_t last = std::min(end, first + panel), width = round_up(last - first, W::kVectors * W::lanes);
      pack<W>(first, last, scratch);
      for (int64_t row = top; row < bottom; row += kRows) {
        const int64_t count = std::min(kRows, bottom - row);
        pack_left<W>(row, count, scratch + left());
        for (int64_t i = 0; i < count; i += W::kTile)
          with_constant<W::kTile>(int(std::min<int64_t>(W::kTile, count - i)), [&](auto tile)
                                                                                  __attribute__((always_inline)) {
            tile_rows<W, decltype(tile)::value>(row + i, first, last, scratch + left() + i * 2 * rank, h + i * panel,
                                                scratch);
          });
        add_rows<W>(row, count, width, h, scratch + sums());
        add_columns<W>(count, width, h, scratch, h_at_parts + (column_part * rows + row) * rank, first == begin);
      }
      for (int64_t j = 0; j < rank; ++j)
        for (int64_t c = first; c < last; ++c)
          to[j * columns + c] = scratch[sums() + j * panel + (c - first)] * T(scale);
    }
  }
};

template <class T>
void add_parts(T* out, const T* parts, int64_t count, int64_t size) {
  std::copy_n(parts, size, out);
  for (int64_t part = 1; part < count; ++part)
    for (int64_t i = 0; i < size; ++i) out[i] += parts[part * size + i];
}

template <class X, class T>
void adam(const LoraProAdam& job, int threads) {
  using Job = ProJob<X, T>;
  const MaskSource first({0, job.seed, 0}, job.step), second({0, job.seed, 1}, job.step);
  Job all{job, {first, second}, {}, 1, 1, 0, static_cast<T*>(job.bt_h), static_cast<T*>(job.h_at)};
  // Factors and sums of a panel take half of a second-level cache.
  const int64_t fits = std::max<int64_t>(1, (1 << 19) / (4 * job.rank * Job::kChunk * int64_t(sizeof(T))));
  all.panel = std::min(round_up(job.columns, Job::kChunk), std::min<int64_t>(fits, 4) * Job::kChunk);
  // Parts, until there is work for many threads or their sums take more than a small share of the moments' memory.
  // Those of one matrix, whatever the batch: same bits.
  const int64_t limits[2] = {ceil_div(job.rows, 4 * Job::kRows), ceil_div(job.columns, all.panel)};
  const int64_t budget = job.rows * job.columns / 32, sizes[2] = {job.rank * job.columns, job.rows * job.rank};
  int64_t parts[2] = {1, 1};
  const auto extra = [&](const int64_t(&count)[2]) {
    return (count[0] > 1 ? count[0] * sizes[0] : 0) + (count[1] > 1 ? count[1] * sizes[1] : 0);
  };
  for (bool grown = true; grown && parts[0] * parts[1] < 64;) {
    grown = false;
    for (int axis = 0; axis < 2; ++axis) {
      int64_t more[2] = {parts[0], parts[1]};
      if (++more[axis] > limits[axis] || extra(more) > budget) continue;
      parts[axis] = more[axis];
      grown = true;
    }
  }
  all.row_parts = parts[0];
  all.column_parts = parts[1];
  const Arena memory(size_t(extra(parts)) * sizeof(T), int(job.batch));
  const size_t table_bytes = Job::kStochastic ? MaskSource::table_bytes(job.columns) : 0;
  const Arena tables(table_bytes, 2);  // which depend on the column alone
  for (int moment = 0; moment < 2; ++moment) all.table[moment] = tables.part(moment);
  std::vector<Job> jobs;
  jobs.reserve(size_t(job.batch));
  Phases phases;
  for (int64_t matrix = 0; matrix < job.batch; ++matrix) {
    Job one = all;
    one.exp_avg = static_cast<X*>(job.exp_avg) + matrix * job.avg_batch;
    one.exp_avg_sq = static_cast<X*>(job.exp_avg_sq) + matrix * job.square_batch;
    one.a = static_cast<const T*>(job.a) + matrix * job.a_batch;
    one.grad_a = static_cast<const T*>(job.grad_a) + matrix * job.grad_a_batch;
    one.b = static_cast<const T*>(job.b) + matrix * job.b_batch;
    one.grad_b = static_cast<const T*>(job.grad_b) + matrix * job.grad_b_batch;
    one.row_offset = job.row_offset + matrix * job.row_step;
    one.bt_h = one.bt_h_parts = static_cast<T*>(job.bt_h) + matrix * sizes[0];
    one.h_at = one.h_at_parts = static_cast<T*>(job.h_at) + matrix * sizes[1];
    T* next = static_cast<T*>(memory.part(int(matrix)));
    if (parts[0] > 1) {
      one.bt_h_parts = next;
      next += parts[0] * sizes[0];
    }
    if (parts[1] > 1) one.h_at_parts = next;
    const int64_t chunks = Job::kStochastic && matrix == 0 ? ceil_div(job.columns, Job::kChunk) : 0;
    jobs.push_back(one);
    phases.add(1, jobs.back(), chunks, parts[0] * parts[1], 4 * job.rows * job.columns * job.rank);
  }
  phases.run(threads);
  for (const Job& one : jobs) {
    if (parts[0] > 1) add_parts(static_cast<T*>(one.bt_h), one.bt_h_parts, parts[0], sizes[0]);
    if (parts[1] > 1) add_parts(static_cast<T*>(one.h_at), one.h_at_parts, parts[1], sizes[1]);
  }
}

}  // namespace

void lora_pro_adam(const LoraProAdam& job, int threads) {
  if (job.batch == 0 || job.rows == 0 || job.columns == 0 || job.rank == 0) return;
  switch (job.dtype) {
    case 0:
      return adam<float, float>(job, threads);
    case 1:
      return adam<double, double>(job, threads);
    default:
      return adam<BFloat16, float>(job, threads);
  }
}

}  // namespace lora_kernels
