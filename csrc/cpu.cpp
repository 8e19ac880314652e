// OpenMP drivers of the memory-bound CPU kernels.
#include <algorithm>
#include <cstring>
#include <vector>

#include "drivers.h"
#include "lanes.h"

namespace lora_kernels {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

LK_HD float widen(float x) { return x; }
LK_HD float widen(BFloat x) { return from_bits(uint32_t(x.bits) << 16); }
LK_HD float widen(Half x) {
  // Exponent and mantissa as a float that is 2^112 too small: one product repairs normal and subnormal numbers alike.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const float value = from_bits(magnitude) * 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits |= magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity and NaN
  return from_bits(bits | uint32_t(x.bits & 0x8000) << 16);
}

template <typename X>
LK_HD void pack_row(const X* x, float weight, int64_t columns, float* panel, float* weighted, double* sum) {
  if (panel) {
#pragma GCC ivdep
    for (int64_t c = 0; c < columns; ++c) panel[c] = widen(x[c]);
  }
  if (weighted) {
#pragma GCC ivdep
    for (int64_t c = 0; c < columns; ++c) weighted[c] = weight * widen(x[c]);
  }
  if (sum) {
#pragma GCC ivdep
    for (int64_t c = 0; c < columns; ++c) sum[c] += double(weight) * double(widen(x[c]));
  }
}

// Rows squared together: the sums pass through the first-level cache once for all of them.
constexpr int kSquareRows = 4;

// sum[c] += sum over `count` (at most four) rows of v * x^2.
template <typename X>
LK_HD void square_group(const X* const* x, const double* v, int count, int64_t columns, double* sum) {
  if (count < kSquareRows) {
    for (int r = 0; r < count; ++r) {
      const X* const row = x[r];
      const double weight = v[r];
#pragma GCC ivdep
      for (int64_t c = 0; c < columns; ++c) {
        const double value = widen(row[c]);
        sum[c] += weight * (value * value);
      }
    }
    return;
  }
  const X *const x0 = x[0], *const x1 = x[1], *const x2 = x[2], *const x3 = x[3];
  const double v0 = v[0], v1 = v[1], v2 = v[2], v3 = v[3];
#pragma GCC ivdep
  for (int64_t c = 0; c < columns; ++c) {
    const double a = widen(x0[c]), b = widen(x1[c]), d = widen(x2[c]), e = widen(x3[c]);
    sum[c] += (v0 * (a * a) + v1 * (b * b)) + (v2 * (d * d) + v3 * (e * e));
  }
}

// Rows summed by one task. Fixed, so that the sum does not depend on the number of threads.
constexpr int64_t kRowBlock = 256;

// out += the partial sums, in order.
void add_partials(const std::vector<double>& partial, int64_t blocks, int64_t columns, float* out) {
  for (int64_t c = 0; c < columns; ++c) {
    double total = out[c];
    for (int64_t block = 0; block < blocks; ++block) total += partial[block * columns + c];
    out[c] = float(total);
  }
}

// Packs and sums the rows of one block.
template <typename X>
struct PackJob {
  const PackRows& job;
  double* sums;     // (blocks, columns) or null
  double* squares;  // likewise
  template <class L>
  LK_HD void group(int64_t block, int, void*) const {
    double* const sum = sums ? sums + block * job.columns : nullptr;
    double* const square = squares ? squares + block * job.columns : nullptr;
    const X* rows[kSquareRows];
    double row_weight[kSquareRows];
    int waiting = 0;
    const int64_t last = std::min(job.rows, (block + 1) * kRowBlock);
    for (int64_t r = block * kRowBlock; r < last; ++r) {
      const int64_t row = job.index ? job.index[r] : r;
      const X* const x = static_cast<const X*>(job.x) + row * job.row_stride;
      pack_row(x, job.weight ? job.weight[r] : 1.0f, job.columns, job.panel ? job.panel + r * job.columns : nullptr,
               job.weighted ? job.weighted + r * job.columns : nullptr, sum);
      const double v = !square ? 0.0 : job.square_weight ? job.square_weight[r] : 1.0f;
      if (v != 0.0) {
        rows[waiting] = x;
        row_weight[waiting++] = v;
      }
      if (waiting == kSquareRows || (waiting && r + 1 == last)) {
        square_group(rows, row_weight, waiting, job.columns, square);
        waiting = 0;
      }
    }
  }
};

template <typename X>
void pack(const PackRows& job, int threads) {
  const int64_t blocks = (job.rows + kRowBlock - 1) / kRowBlock;
  std::vector<double> sums(job.column_sum ? blocks * job.columns : 0, 0.0);
  std::vector<double> squares(job.square_sum ? blocks * job.columns : 0, 0.0);
  const PackJob<X> work{job, job.column_sum ? sums.data() : nullptr, job.square_sum ? squares.data() : nullptr};
  const int bytes = lane_bytes();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) run_group(work, block, 1, nullptr, bytes);
  if (job.column_sum) add_partials(sums, blocks, job.columns, job.column_sum);
  if (job.square_sum) add_partials(squares, blocks, job.columns, job.square_sum);
}

}  // namespace

void pack_rows(const PackRows& job, int threads) {
  switch (job.dtype) {
    case 0:
      return pack<float>(job, threads);
    case 1:
      return pack<Half>(job, threads);
    default:
      return pack<BFloat>(job, threads);
  }
}

}  // namespace lora_kernels
