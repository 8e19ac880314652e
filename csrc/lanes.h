// One matrix per vector lane: the vector type, loads that transpose a batch into lanes, and the choice of its width.
//
// Every step of an algorithm on a small matrix is then a full-width vector operation, whatever its order. The width is
// a template parameter, and each width is compiled for the instruction set that has it. Lanes compute in float64 also
// for float32 matrices: the results are then float32's own rounding away from the truth.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are only passed between functions that are always inlined
#endif

#include "small_linalg.h"

namespace lora_kernels {

template <int BYTES>
struct Lanes {
  typedef double V __attribute__((vector_size(BYTES)));
  typedef int64_t Mask __attribute__((vector_size(BYTES)));
  static constexpr int count = BYTES / int(sizeof(double));
  // A template, because GCC takes a vector of dependent size for a number while it parses this class.
  template <class X>
  static LK_HD X root(const X& x) {
    X y;
    for (int l = 0; l < count; ++l) y[l] = std::sqrt(x[l]);
    return y;
  }
  template <class X>
  static LK_HD X inverse_root(const X& x) {
    return 1 / root(x);
  }
};

template <class L>
LK_HD typename L::V splat(double x) {
  return typename L::V{} + x;
}

template <class L>
LK_HD typename L::V magnitude(const typename L::V& x) {
  return x < 0 ? -x : x;
}

template <class L>
LK_HD typename L::V larger(const typename L::V& x, const typename L::V& y) {
  return x > y ? x : y;
}

template <class L>
LK_HD bool any(const typename L::Mask& mask) {
  int64_t all = 0;
  for (int l = 0; l < L::count; ++l) all |= mask[l];
  return all != 0;
}

// The largest of non-negative integers.
template <class L>
LK_HD int highest(const typename L::Mask& x) {
  int64_t top = 0;
  for (int l = 0; l < L::count; ++l) top = x[l] > top ? x[l] : top;
  return int(top);
}

// Where each lane reads: `count` matrices of `size` entries from the first on; idle lanes repeat the last.
template <class L, typename T>
struct Sources {
  const T* lane[L::count];
  LK_HD Sources(const T* first, int64_t size, int count) {
    for (int l = 0; l < L::count; ++l) lane[l] = first + size * (l < count ? l : count - 1);
  }
  LK_HD typename L::V operator[](int64_t entry) const {
    typename L::V x;
    for (int l = 0; l < L::count; ++l) x[l] = double(lane[l][entry]);
    return x;
  }
};

// c (rows, columns) = a b, where a(i, k) is a[i * a_row + k * a_column] and b(k, j) likewise.
template <class L>
LK_HD void multiply(const typename L::V* a, int a_row, int a_column, const typename L::V* b, int b_row, int b_column,
                    typename L::V* c, int rows, int inner, int columns) {
  using V = typename L::V;
  for (int i = 0; i < rows; i += 4) {
    const int last = rows - 1;  // rows past the end repeat the last one
    const V* const a0 = a + i * a_row;
    const V* const a1 = a + (i + 1 < rows ? i + 1 : last) * a_row;
    const V* const a2 = a + (i + 2 < rows ? i + 2 : last) * a_row;
    const V* const a3 = a + (i + 3 < rows ? i + 3 : last) * a_row;
    for (int j = 0; j < columns; ++j) {
      V s0 = V{}, s1 = V{}, s2 = V{}, s3 = V{};
      for (int k = 0; k < inner; ++k) {
        const V x = b[k * b_row + j * b_column];
        s0 += a0[k * a_column] * x;
        s1 += a1[k * a_column] * x;
        s2 += a2[k * a_column] * x;
        s3 += a3[k * a_column] * x;
      }
      V* const out = c + i * columns + j;
      out[0] = s0;
      if (i + 1 < rows) out[columns] = s1;
      if (i + 2 < rows) out[2 * columns] = s2;
      if (i + 3 < rows) out[3 * columns] = s3;
    }
  }
}

// Scratch memory of all threads, each part on cache lines of its own.
class Arena {
 public:
  Arena(size_t bytes, int parts)
      : part_((bytes / kLine + 2) * kLine),
        memory_(part_ * parts <= kSmall ? small_ : static_cast<char*>(std::aligned_alloc(kLine, part_ * parts))) {
    if (!memory_) throw std::bad_alloc();
  }
  ~Arena() {
    if (memory_ != small_) std::free(memory_);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  void* part(int number) const { return memory_ + part_ * number; }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t kLine = 64, kSmall = kLine;  // none: the sanitizer sees what lies around an allocation
#else
  static constexpr size_t kLine = 64, kSmall = 16384;
#endif
  size_t part_;
  char* memory_;
  alignas(kLine) char small_[kSmall];  // an aligned allocation takes longer than a product of a small layer
};

// The most bytes that a vector may have: $LORA_KERNELS_LANE_BYTES, or 64. For tests of what other machines run.
inline int lane_limit() {
  const char* const limit = std::getenv("LORA_KERNELS_LANE_BYTES");
  if (!limit) return 64;
  for (const char* each : {"16", "32", "64"})
    if (!std::strcmp(limit, each)) return std::atoi(limit);
  throw std::invalid_argument(std::string("LORA_KERNELS_LANE_BYTES is '") + limit + "', but must be 16, 32 or 64");
}

// A job does `template <class L> void group(int64_t first, int count, typename L::V* scratch) const` on items
// first .. first + count - 1, marked LK_HD so that it is compiled for each target.
#if defined(__x86_64__) && defined(__GNUC__)
template <class Job>
__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))) void group_512(const Job& job, int64_t first,
                                                                                    int count, void* scratch) {
  job.template group<Lanes<64>>(first, count, static_cast<Lanes<64>::V*>(scratch));
}
template <class Job>
__attribute__((target("avx2,fma"))) void group_256(const Job& job, int64_t first, int count, void* scratch) {
  job.template group<Lanes<32>>(first, count, static_cast<Lanes<32>::V*>(scratch));
}
inline int widest_lane() {
  const bool wide = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool widest = wide && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  return widest ? 64 : wide ? 32 : 16;
}
#else
inline int widest_lane() { return 16; }
#endif

// Bytes of the vectors of all kernels, read once. May throw: never first called inside a parallel region.
inline int lane_bytes() {
  static const int bytes = [] {
    const int limit = lane_limit(), widest = widest_lane();
    return limit < widest ? limit : widest;
  }();
  return bytes;
}

template <class Job>
void group_128(const Job& job, int64_t first, int count, void* scratch) {
  job.template group<Lanes<16>>(first, count, static_cast<Lanes<16>::V*>(scratch));
}

inline int lane_count() { return lane_bytes() / int(sizeof(double)); }

// One group, compiled for vectors of that many bytes.
template <class Job>
void run_group(const Job& job, int64_t first, int count, void* scratch, int bytes) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (bytes == 64) return group_512(job, first, count, scratch);
  if (bytes == 32) return group_256(job, first, count, scratch);
#endif
  group_128(job, first, count, scratch);
}

// Runs a job over `items` in groups of `step`; `vectors` is how many vectors of scratch memory a group needs.
template <class Job>
void run_groups(const Job& job, int64_t items, int step, int64_t vectors, int threads) {
  const int bytes = lane_bytes();
  const int64_t groups = (items + step - 1) / step;
  if (threads > groups) threads = int(groups > 0 ? groups : 1);
  const Arena arena(size_t(vectors) * bytes, threads);  // here, because nothing may be thrown inside
#pragma omp parallel num_threads(threads)
  {
#ifdef _OPENMP
    void* const scratch = arena.part(omp_get_thread_num());
#else
    void* const scratch = arena.part(0);
#endif
#pragma omp for schedule(dynamic, 1)
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = group * step;
      run_group(job, first, int(items - first < step ? items - first : step), scratch, bytes);
    }
  }
}

}  // namespace lora_kernels
