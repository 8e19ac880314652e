// The three skinny products of a LoRA layer on the CPU: what torch's matrix product does, with dropout applied while
// the big operand passes through the caches. It is read once, and no mask or masked copy of it goes to memory.
//
// A result's sums run in an order that depends on the shape alone: not on threads, blocks or the rows around it.
#include "lora_lanes.h"

#include <algorithm>
#include <new>

#include "drivers.h"
#include "lora_tasks.h"

namespace lora_kernels {
namespace {

// A row, masked or not, and zeros behind it.
template <class W, bool MASKED, class X>
LK_HD void copy_masked(const X* from, int64_t used, const uint16_t* random, int threshold, float* to,
                       int64_t width) {
  const int64_t whole = used / W::lanes * W::lanes;
  for (int64_t c = 0; c < whole; c += W::lanes) {
    const auto x = load_float<W>(from + c);
    store(to + c, MASKED ? keep<W>(x, random + c, threshold) : x);
  }
  for (int64_t c = whole; c < used; ++c) to[c] = !MASKED || random[c] >= threshold ? widen(from[c]) : 0.0f;
  for (int64_t c = used; c < width; ++c) to[c] = 0.0f;
}

// Lanes run along the columns that are summed over: no lane is idle, whatever the rank. A few rows at a time, a panel
// of columns at a time: drop(x) is written to the first-level cache, where tiles of rows x columns of a^T find it.
template <class X>
struct ShrinkJob : LoraShrink {
  static constexpr int64_t kPanel = 512, kRows = 6;
  MaskSource mask;
  float* packed;  // a by panels, tiles, vectors
  void* table;

  static int64_t padded(int64_t columns) { return round_up(columns, 16); }
  int64_t panels() const { return ceil_div(columns, kPanel); }
  int64_t blocks() const { return ceil_div(tokens, kRows); }
  int64_t scratch() const { return kRows * kPanel + kPanel / 2 + round_up(kRows * rank, 16) * 17; }
  int64_t width(int64_t first) const { return std::min(kPanel, padded(columns) - first); }

  template <class W>
  LK_HD void prepare(int64_t panel) const {
    const int64_t first = panel * kPanel, vectors = width(first) / W::lanes;
    const Tiles tiles(rank, W::kTile);
    float* out = packed + first * rank;
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const int64_t begin = tiles.first(tile), end = tiles.first(tile + 1);
      for (int64_t k = 0; k < vectors; ++k)
        for (int64_t j = begin; j < end; ++j, out += W::lanes) {
          const int64_t column = first + k * W::lanes;
          const float* const from = a + j * a_stride + column;
          if (column + W::lanes <= columns)
            store(out, load<typename W::F>(from));
          else
            for (int l = 0; l < W::lanes; ++l) out[l] = column + l < columns ? from[l] : 0.0f;
        }
    }
    if (table) mask.fill_table<W>(table, first, std::min(first + kPanel, columns));
  }

  template <class W>
  LK_HD void copy_row(int64_t row, int64_t first, float* to, uint16_t* random) const {
    const X* const from = static_cast<const X*>(x) + row * x_stride + first;
    const int64_t used = std::min(kPanel, columns - first);
    if (table) {
      mask.draw<W>(table, row, first, first + used, random);
      copy_masked<W, true>(from, used, random, mask.threshold, to, width(first));
    } else {
      copy_masked<W, false>(from, used, random, mask.threshold, to, width(first));
    }
  }

  template <class W>
  LK_HD void work(int64_t block, float* scratch) const {
    const int64_t begin = block * kRows, rows = std::min(kRows, tokens - begin);
    float* const copy = scratch;
    uint16_t* const random = reinterpret_cast<uint16_t*>(copy + kRows * kPanel);
    float* const sums = copy + kRows * kPanel + kPanel / 2;
    float* const totals = sums + round_up(kRows * rank, 16) * 16;
    const Tiles tiles(rank, W::kTile);
    for (int64_t first = 0; first < columns; first += kPanel) {
      for (int64_t i = 0; i < rows; ++i) copy_row<W>(begin + i, first, copy + i * kPanel, random);
      const int64_t vectors = width(first) / W::lanes;
      for (int64_t tile = 0; tile < tiles.count; ++tile) {
        const int64_t j = tiles.first(tile), count = tiles.first(tile + 1) - j;
        const float* const factor = packed + first * rank + j * vectors * W::lanes;
        with_constant<W::kTile>(int(count), [&](auto tile_columns) __attribute__((always_inline)) {
          for (int64_t i = 0; i < rows; i += 3) {
            float* const sum = sums + (i * rank + j) * W::lanes;
            with_constant<3>(int(std::min<int64_t>(3, rows - i)), [&](auto tile_rows) __attribute__((always_inline)) {
              inner_tile<W, decltype(tile_rows)::value, decltype(tile_columns)::value>(
                  copy + i * kPanel, kPanel, factor, vectors, sum, rank * W::lanes, first == 0);
            });
          }
        });
      }
    }
    const float final_scale = scale * mask.factor;
    for (int64_t s = 0; s < rows * rank; s += W::lanes)
      store(totals + s, lane_sums<W>(sums + s * W::lanes) * final_scale);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < rank; ++j) t[(begin + i) * t_stride + j] = totals[i * rank + j];
  }
};

// Columns in strips as wide as a tile. Strips of all vector widths fill a chunk, and its random bits fill vectors.
constexpr int64_t kChunk = 192;

// Each task owns columns of the result. Sums of few rows stay in registers, and are added up in memory.
template <class X>
struct ReduceJob : LoraReduce {
  static constexpr int64_t kRows = 16;
  MaskSource mask;
  void* table;
  int64_t panel;  // columns per task, a multiple of MaskSource::kColumns

  int64_t blocks() const { return ceil_div(columns, panel); }
  int64_t scratch() const { return rank * round_up(panel, 16) + kRows * kChunk / 2 + kRows * 48; }

  template <class W>
  LK_HD void prepare(int64_t block) const {
    if (table) mask.fill_table<W>(table, block * panel, std::min(columns, (block + 1) * panel));
  }

  template <class W, bool MASKED>
  LK_HD void add_rows(int64_t row, int64_t begin, int64_t end, float* sums, int64_t sum_stride, uint16_t* random,
                      float* copy) const {
    constexpr int64_t strip = W::kVectors * W::lanes;
    const int64_t rows = std::min(kRows, tokens - row);
    const Tiles tiles(rank, W::kTile);
    for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
      const int64_t last = std::min(end, chunk + kChunk);
      if (MASKED)
        for (int64_t i = 0; i < rows; ++i) mask.draw<W>(table, row + i, chunk, last, random + i * kChunk);
      for (int64_t c = chunk; c < last; c += strip) {
        const int64_t used = std::min(strip, last - c), vectors = ceil_div(used, W::lanes);
        const X* const from = static_cast<const X*>(z) + row * z_stride + c;
        // Several tiles read a float copy. So does a tile whose vectors reach past the last column.
        const bool copied = used % W::lanes || ((MASKED || sizeof(X) < sizeof(float)) && tiles.count > 1);
        if (copied)
          for (int64_t i = 0; i < rows; ++i)
            copy_masked<W, MASKED>(from + i * z_stride, used, random + i * kChunk + (c - chunk), mask.threshold,
                                   copy + i * strip, vectors * W::lanes);
        with_constant<W::kVectors>(int(vectors), [&](auto tile_vectors) __attribute__((always_inline)) {
          for (int64_t tile = 0; tile < tiles.count; ++tile) {
            const int64_t j = tiles.first(tile), count = tiles.first(tile + 1) - j;
            with_constant<W::kTile>(int(count), [&](auto tile_rows) __attribute__((always_inline)) {
              constexpr int M = decltype(tile_rows)::value, V = decltype(tile_vectors)::value;
              typename W::F sum[M][V];
              const float* const factor = t + row * t_stride + j;
              if (copied)
                outer_tile<W, M, V, false>(factor, t_stride, copy, strip, rows, nullptr, 0, 0, sum);
              else
                outer_tile<W, M, V, MASKED>(factor, t_stride, from, z_stride, rows, random + (c - chunk), kChunk,
                                            mask.threshold, sum);
              for (int m = 0; m < M; ++m)
                for (int v = 0; v < V; ++v) {
                  float* const to = sums + (j + m) * sum_stride + (c - begin) + v * W::lanes;
                  store(to, load<typename W::F>(to) + sum[m][v]);
                }
            });
          }
        });
      }
    }
  }

  template <class W>
  LK_HD void work(int64_t block, float* sums) const {
    const int64_t begin = block * panel, end = std::min(columns, begin + panel), stride = round_up(end - begin, 16);
    uint16_t* const random = reinterpret_cast<uint16_t*>(sums + rank * round_up(panel, 16));
    float* const copy = sums + rank * round_up(panel, 16) + kRows * kChunk / 2;
    for (int64_t s = 0; s < rank * stride; ++s) sums[s] = 0.0f;
    for (int64_t row = 0; row < tokens; row += kRows) {
      if (table)
        add_rows<W, true>(row, begin, end, sums, stride, random, copy);
      else
        add_rows<W, false>(row, begin, end, sums, stride, random, copy);
    }
    for (int64_t j = 0; j < rank; ++j)
      for (int64_t c = 0; c < end - begin; ++c) out[j * out_stride + begin + c] = mask.factor * sums[j * stride + c];
  }
};

// A task is a block of rows and a panel of columns whose part of b fits the second-level cache.
template <class X>
struct ExpandJob : LoraExpand {
  static constexpr int64_t kRows = 32;
  MaskSource mask;
  float* packed;  // b by strips, rows
  float* base;    // the bias, or zeros
  void* table;
  int64_t panel;  // columns per task, a multiple of kChunk

  int64_t chunks() const { return ceil_div(columns, kChunk); }
  int64_t panels() const { return ceil_div(columns, panel); }
  int64_t blocks() const { return panels() * ceil_div(tokens, kRows); }
  int64_t scratch() const { return round_up(rank * 8, 16) + 8 * kChunk / 2 + 8 * 48; }

  template <class W>
  LK_HD void prepare(int64_t chunk) const {
    constexpr int64_t strip = W::kVectors * W::lanes;
    const int64_t first = chunk * kChunk, last = std::min(columns, first + kChunk);
    for (int64_t c = first; c < last; c += strip) {
      const int64_t used = std::min(strip, last - c);
      for (int64_t j = 0; j < rank; ++j) {
        float* const to = packed + c * rank + j * strip;
        const float* const from = b + j * b_stride + c;
        if (used == strip)
          for (int64_t l = 0; l < strip; l += W::lanes) store(to + l, load<typename W::F>(from + l));
        else
          for (int64_t l = 0; l < strip; ++l) to[l] = l < used ? from[l] : 0.0f;
      }
    }
    for (int64_t c = first; c < first + kChunk; ++c) base[c] = bias && c < columns ? bias[c] : 0.0f;
    if (table) mask.fill_table<W>(table, first, last);
  }

  template <class W, int M, bool MASKED>
  LK_HD void tile_rows(int64_t row, int64_t begin, int64_t end, float* scratch) const {
    using F = typename W::F;
    constexpr int V = W::kVectors;
    constexpr int64_t strip = V * W::lanes;
    float* const columns_of_t = scratch;
    uint16_t* const random = reinterpret_cast<uint16_t*>(scratch + round_up(rank * 8, 16));
    X* const ragged = reinterpret_cast<X*>(scratch + round_up(rank * 8, 16) + 8 * kChunk / 2);
    for (int64_t j = 0; j < rank; ++j)
      for (int m = 0; m < M; ++m) columns_of_t[j * M + m] = t[(row + m) * t_stride + j];
    for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
      const int64_t last = std::min(end, chunk + kChunk);
      if (MASKED)
        for (int m = 0; m < M; ++m) mask.draw<W>(table, row + m, chunk, last, random + m * kChunk);
      for (int64_t c = chunk; c < last; c += strip) {
        F sum[M][V];
        outer_tile<W, M, V, false>(columns_of_t, M, packed + c * rank, strip, rank, nullptr, 0, 0, sum);
        const int64_t used = std::min(strip, last - c);
        X* const whole = static_cast<X*>(y) + row * y_stride + c;
        X* const to = used < strip ? ragged : whole;
        const int64_t to_stride = used < strip ? strip : y_stride;
        if (used < strip && accumulate)
          for (int m = 0; m < M; ++m)
            for (int64_t l = 0; l < strip; ++l) ragged[m * strip + l] = l < used ? whole[m * y_stride + l] : X{};
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) {
            F value = sum[m][v];
            if (MASKED)
              value = keep<W>(value * mask.factor, random + m * kChunk + (c - chunk) + v * W::lanes, mask.threshold);
            X* const here = to + m * to_stride + v * W::lanes;
            store_float<W>(here, value + (accumulate ? load_float<W>(here) : load<F>(base + c + v * W::lanes)));
          }
        if (used < strip)
          for (int m = 0; m < M; ++m)
            for (int64_t l = 0; l < used; ++l) whole[m * y_stride + l] = ragged[m * strip + l];
      }
    }
  }

  template <class W>
  LK_HD void work(int64_t item, float* scratch) const {
    const int64_t begin = item % panels() * panel, end = std::min(columns, begin + panel);
    const int64_t first = item / panels() * kRows, last = std::min(tokens, first + kRows);
    for (int64_t row = first; row < last; row += W::kTile)
      with_constant<W::kTile>(int(std::min<int64_t>(W::kTile, last - row)), [&](auto rows)
                                                                               __attribute__((always_inline)) {
        constexpr int M = decltype(rows)::value;
        if (table)
          tile_rows<W, M, true>(row, begin, end, scratch);
        else
          tile_rows<W, M, false>(row, begin, end, scratch);
      });
  }
};

size_t table_bytes(const Dropout& dropout, int64_t columns) {
  return dropout.threshold > 0 ? round_up(MaskSource::table_bytes(columns), 64) : 0;
}

// Memory of many jobs: their sizes in bytes are added up first.
class Parts {
 public:
  explicit Parts(size_t bytes) : memory_(bytes, 1), next_(static_cast<char*>(memory_.part(0))) {}
  template <class T>
  T* take(size_t bytes) {
    T* const part = reinterpret_cast<T*>(next_);
    next_ += bytes;
    return bytes == 0 ? nullptr : part;
  }

 private:
  Arena memory_;
  char* next_;
};

bool has_work(const LoraShrink& job) { return job.tokens > 0 && job.columns > 0 && job.rank > 0; }
bool has_work(const LoraReduce& job) { return job.columns > 0 && job.rank > 0; }
bool has_work(const LoraExpand& job) { return job.tokens > 0 && job.columns > 0; }

// A job in memory of its own: `bytes` of it, job and buffers, and how it enters the phases.
template <class Job>
size_t own_bytes() {
  static_assert(std::is_trivially_destructible_v<Job>);
  return size_t(round_up(sizeof(Job), 64));
}
template <class X>
struct Shrinks {
  using Job = ShrinkJob<X>;
  static size_t packed(const LoraShrink& job) {
    return size_t(round_up(job.rank * Job::padded(job.columns), 16)) * sizeof(float);
  }
  static size_t bytes(const LoraShrink& job) {
    return own_bytes<Job>() + packed(job) + table_bytes(job.dropout, job.columns);
  }
  static void add(Phases& phases, int phase, Parts& parts, const LoraShrink& job, int) {
    void* const memory = parts.take<void>(own_bytes<Job>());
    float* const factor = parts.take<float>(packed(job));
    void* const table = parts.take<void>(table_bytes(job.dropout, job.columns));
    const Job& one = *new (memory) Job{job, MaskSource(job.dropout), factor, table};
    phases.add(phase, one, one.panels(), one.blocks(), job.tokens * job.columns * job.rank);
  }
};
template <class X>
struct Reduces {
  using Job = ReduceJob<X>;
  static size_t bytes(const LoraReduce& job) { return own_bytes<Job>() + table_bytes(job.dropout, job.columns); }
  static void add(Phases& phases, int phase, Parts& parts, const LoraReduce& job, int threads) {
    void* const memory = parts.take<void>(own_bytes<Job>());
    Job& one = *new (memory)
        Job{job, MaskSource(job.dropout), parts.take<void>(table_bytes(job.dropout, job.columns)), 0};
    // Equal shares, but sums that fit half of a second-level cache.
    const int64_t fits = std::max<int64_t>(1, (1 << 16) / (job.rank * MaskSource::kColumns)) * MaskSource::kColumns;
    const int64_t shares = round_up(ceil_div(job.columns, fits), threads);
    one.panel = round_up(ceil_div(job.columns, shares), MaskSource::kColumns);
    phases.add(phase, one, one.table ? one.blocks() : 0, one.blocks(), job.tokens * job.columns * job.rank);
  }
};
template <class X>
struct Expands {
  using Job = ExpandJob<X>;
  static size_t base(const LoraExpand& job) { return size_t(round_up(job.columns, kChunk)) * sizeof(float); }
  static size_t bytes(const LoraExpand& job) {
    return own_bytes<Job>() + size_t(job.rank + 1) * base(job) + table_bytes(job.dropout, job.columns);
  }
  static void add(Phases& phases, int phase, Parts& parts, const LoraExpand& job, int) {
    void* const memory = parts.take<void>(own_bytes<Job>());
    float* const packed = parts.take<float>(size_t(job.rank) * base(job));
    float* const bias = parts.take<float>(base(job));
    void* const table = parts.take<void>(table_bytes(job.dropout, job.columns));
    Job& one = *new (memory) Job{job, MaskSource(job.dropout), packed, bias, table, 0};
    const int64_t rank = std::max<int64_t>(job.rank, 1);
    const int64_t fits = std::max<int64_t>(1, (1 << 16) / (rank * kChunk)) * kChunk;
    one.panel = round_up(ceil_div(job.columns, ceil_div(job.columns, fits)), kChunk);
    phases.add(phase, one, one.chunks(), one.blocks(), job.tokens * job.columns * rank);
  }
};

// Products of one dtype that run together: those of a phase read what earlier phases have written.
class Products {
 public:
  void add(int phase, const LoraShrink& job) {
    if (job.columns == 0)
      for (int64_t i = 0; i < job.tokens; ++i) std::fill_n(job.t + i * job.t_stride, job.rank, 0.0f);
    keep(shrinks_, phase, job);
  }
  void add(int phase, const LoraReduce& job) { keep(reduces_, phase, job); }
  void add(int phase, const LoraExpand& job) { keep(expands_, phase, job); }
  void run(bool bfloat16, int threads) const { bfloat16 ? run_as<BFloat16>(threads) : run_as<float>(threads); }

 private:
  template <class Description>
  using Jobs = std::vector<std::pair<int, Description>>;
  Jobs<LoraShrink> shrinks_;
  Jobs<LoraReduce> reduces_;
  Jobs<LoraExpand> expands_;

  template <class Description>
  static void keep(Jobs<Description>& jobs, int phase, const Description& job) {
    if (has_work(job)) jobs.push_back({phase, job});
  }
  template <class Kind, class Description>
  static size_t bytes(const Jobs<Description>& jobs) {
    size_t sum = 0;
    for (const auto& [phase, job] : jobs) sum += Kind::bytes(job);
    return sum;
  }
  template <class Kind, class Description>
  static void add_all(const Jobs<Description>& jobs, Phases& phases, Parts& parts, int threads) {
    for (const auto& [phase, job] : jobs) Kind::add(phases, phase, parts, job, threads);
  }
  template <class X>
  void run_as(int threads) const {
    Parts parts(bytes<Shrinks<X>>(shrinks_) + bytes<Reduces<X>>(reduces_) + bytes<Expands<X>>(expands_));
    Phases phases;
    add_all<Shrinks<X>>(shrinks_, phases, parts, threads);
    add_all<Reduces<X>>(reduces_, phases, parts, threads);
    add_all<Expands<X>>(expands_, phases, parts, threads);
    phases.run(threads);
  }
};

template <class Description>
void run_all(const Description* jobs, size_t count, int threads) {
  Products products;
  for (size_t i = 0; i < count; ++i) products.add(1, jobs[i]);
  if (count > 0) products.run(jobs[0].bfloat16, threads);
}

}  // namespace

void lora_shrink(const std::vector<LoraShrink>& jobs, int threads) { run_all(jobs.data(), jobs.size(), threads); }
void lora_tsreduce(const std::vector<LoraReduce>& jobs, int threads) { run_all(jobs.data(), jobs.size(), threads); }
void lora_expand(const std::vector<LoraExpand>& jobs, int threads) { run_all(jobs.data(), jobs.size(), threads); }

void lora_shrink(const LoraShrink& job, int threads) { run_all(&job, 1, threads); }
void lora_tsreduce(const LoraReduce& job, int threads) { run_all(&job, 1, threads); }
void lora_expand(const LoraExpand& job, int threads) { run_all(&job, 1, threads); }

namespace {

// A dense matrix, widened; and its transpose.
void widen_all(const void* from, bool bfloat16, int64_t size, float* to) {
  const auto copy = [&](const auto* data) {
    for (int64_t i = 0; i < size; ++i) to[i] = widen(data[i]);
  };
  bfloat16 ? copy(static_cast<const BFloat16*>(from)) : copy(static_cast<const float*>(from));
}
void transpose(const void* from, bool bfloat16, int64_t rows, int64_t columns, float* to) {
  const auto copy = [&](const auto* data) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < columns; ++c) to[c * rows + i] = widen(data[i * columns + c]);
  };
  bfloat16 ? copy(static_cast<const BFloat16*>(from)) : copy(static_cast<const float*>(from));
}

// The factors of a layer as the products read them: [a; a0] and [b, b0]^T, each (rank + frozen_rank, columns).
struct Factors {
  Arena memory;
  const float *a, *b;

  static bool in_place(const LoraLayer& l) { return !l.bfloat16_factors && l.frozen_rank == 0; }

  explicit Factors(const LoraLayer& l)
      : memory(size_t(l.rank + l.frozen_rank) * size_t(l.outputs + (in_place(l) ? 0 : l.inputs)) * sizeof(float), 1) {
    float* const right = static_cast<float*>(memory.part(0));
    transpose(l.b, l.bfloat16_factors, l.outputs, l.rank, right);
    transpose(l.b0, l.bfloat16_frozen, l.outputs, l.frozen_rank, right + l.rank * l.outputs);
    b = right;
    a = static_cast<const float*>(l.a);
    if (in_place(l)) return;
    float* const left = right + (l.rank + l.frozen_rank) * l.outputs;
    widen_all(l.a, l.bfloat16_factors, l.rank * l.inputs, left);
    widen_all(l.a0, l.bfloat16_frozen, l.frozen_rank * l.inputs, left + l.rank * l.inputs);
    a = left;
  }
};

constexpr Dropout kNone{0, 0, 0};

}  // namespace

void lora_forward(const LoraForward& job, int threads) {
  const LoraLayer& l = job.layer;
  const Factors factors(l);
  const int64_t ranks = l.rank + l.frozen_rank;
  Products products;
  const auto shrink = [&](int64_t first, int64_t count, float scale, const Dropout& dropout) {
    products.add(1, LoraShrink{job.x, l.bfloat16, job.x_stride, factors.a + first * l.inputs, l.inputs, job.t + first,
                               ranks, l.tokens, l.inputs, count, scale, dropout});
  };
  shrink(0, l.rank, l.scale, l.dropout);
  shrink(l.rank, l.frozen_rank, l.frozen_scale, kNone);
  products.add(2, LoraExpand{job.t, ranks, factors.b, l.outputs, job.y, l.bfloat16, l.outputs, l.tokens, l.outputs,
                             ranks, true, nullptr, kNone});
  products.run(l.bfloat16, threads);
}

void lora_backward(const LoraBackward& job, int threads) {
  const LoraLayer& l = job.layer;
  const Factors factors(l);
  const int64_t ranks = l.rank + l.frozen_rank;
  const int64_t projected = job.dx || job.da ? l.tokens * ranks : 0, summed = job.db ? l.rank * l.outputs : 0;
  const Arena memory(size_t(projected + summed) * sizeof(float), 1);
  float* const u = static_cast<float*>(memory.part(0));
  float* const sums = u + projected;  // db^T
  Products products;
  if (projected) {
    const auto shrink = [&](int64_t first, int64_t count, float scale) {
      products.add(1, LoraShrink{job.g, l.bfloat16, job.g_stride, factors.b + first * l.outputs, l.outputs, u + first,
                                 ranks, l.tokens, l.outputs, count, scale, kNone});
    };
    shrink(0, l.rank, l.scale);
    if (job.dx) shrink(l.rank, l.frozen_rank, l.frozen_scale);
  }
  if (job.db)
    products.add(1, LoraReduce{job.t, ranks, job.g, l.bfloat16, job.g_stride, sums, l.outputs, l.tokens, l.outputs,
                               l.rank, kNone});
  if (job.da)
    products.add(2, LoraReduce{u, ranks, job.x, l.bfloat16, job.x_stride, job.da, l.inputs, l.tokens, l.inputs, l.rank,
                               l.dropout});
  if (job.dx) {
    const int64_t together = l.dropout.threshold > 0 ? l.rank : ranks;
    const auto expand = [&](int phase, int64_t first, int64_t count, bool accumulate, const Dropout& dropout) {
      products.add(phase, LoraExpand{u + first, ranks, factors.a + first * l.inputs, l.inputs, job.dx, l.bfloat16,
                                     l.inputs, l.tokens, l.inputs, count, accumulate, nullptr, dropout});
    };
    expand(2, 0, together, job.accumulate, l.dropout);
    if (together < ranks) expand(3, together, ranks - together, true, kNone);
  }
  products.run(l.bfloat16, threads);
  if (job.db) transpose(sums, false, l.rank, l.outputs, job.db);
}

}  // namespace lora_kernels
