// One matrix per vector lane: the vector type, loads that transpose a batch into lanes, and the choice of its width.
//
// Every step of an algorithm on a small matrix is then a full-width vector operation, whatever its order. The width is
// a template parameter, and each width is compiled for the instruction set that has it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "small_linalg.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are only passed between functions that are always inlined
#endif

namespace lora_kernels {

template <typename T, int BYTES>
struct Lanes;
#define LK_LANES(TYPE, INT, BYTES)                             \
  template <>                                                  \
  struct Lanes<TYPE, BYTES> {                                  \
    typedef TYPE V __attribute__((vector_size(BYTES)));        \
    typedef INT Mask __attribute__((vector_size(BYTES)));      \
    typedef TYPE Scalar;                                       \
    typedef INT Integer;                                       \
    static constexpr int count = BYTES / int(sizeof(TYPE));    \
  };
LK_LANES(float, int32_t, 16)
LK_LANES(float, int32_t, 32)
LK_LANES(float, int32_t, 64)
LK_LANES(double, int64_t, 16)
LK_LANES(double, int64_t, 32)
LK_LANES(double, int64_t, 64)
#undef LK_LANES

template <class L>
LK_HD typename L::V splat(typename L::Scalar x) {
  return typename L::V{} + x;
}

template <class L>
LK_HD typename L::V square_root(const typename L::V& x) {
  typename L::V y;
  for (int l = 0; l < L::count; ++l) y[l] = std::sqrt(x[l]);
  return y;
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
  typename L::Integer all = 0;
  for (int l = 0; l < L::count; ++l) all |= mask[l];
  return all != 0;
}

// The largest of small non-negative integers.
template <class L>
LK_HD int highest(const typename L::Mask& x) {
  typename L::Integer top = 0;
  for (int l = 0; l < L::count; ++l) top = x[l] > top ? x[l] : top;
  return int(top);
}

// Where each lane reads: `count` matrices of `size` entries from the first on; idle lanes repeat the last.
template <class L>
struct Sources {
  const typename L::Scalar* lane[L::count];
  LK_HD Sources(const typename L::Scalar* first, int64_t size, int count) {
    for (int l = 0; l < L::count; ++l) lane[l] = first + size * (l < count ? l : count - 1);
  }
  LK_HD typename L::V operator[](int64_t entry) const {
    typename L::V x;
    for (int l = 0; l < L::count; ++l) x[l] = lane[l][entry];
    return x;
  }
};

// Scratch memory of one thread.
class Arena {
 public:
  explicit Arena(size_t bytes) : memory_(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64)) {
    if (!memory_) throw std::bad_alloc();
  }
  ~Arena() { std::free(memory_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  void* get() const { return memory_; }

 private:
  void* memory_;
};

// A job does `template <class L> void group(int64_t first, int count, typename L::V* scratch) const` for the matrices
// first .. first + count - 1, marked LK_HD so that it is compiled for each target.
#if defined(__x86_64__) && defined(__GNUC__)
template <class Job>
__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))) void group_512(const Job& job, int64_t first,
                                                                                    int count, void* scratch) {
  using L = Lanes<typename Job::Scalar, 64>;
  job.template group<L>(first, count, static_cast<typename L::V*>(scratch));
}
template <class Job>
__attribute__((target("avx2,fma"))) void group_256(const Job& job, int64_t first, int count, void* scratch) {
  using L = Lanes<typename Job::Scalar, 32>;
  job.template group<L>(first, count, static_cast<typename L::V*>(scratch));
}
inline int lane_bytes() {
  static const int bytes = [] {
    const bool wide = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool widest = wide && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
    return widest ? 64 : wide ? 32 : 16;
  }();
  return bytes;
}
#else
inline int lane_bytes() { return 16; }
#endif

template <class Job>
void group_128(const Job& job, int64_t first, int count, void* scratch) {
  using L = Lanes<typename Job::Scalar, 16>;
  job.template group<L>(first, count, static_cast<typename L::V*>(scratch));
}

// Runs a job over a batch; `vectors` is how many vectors of scratch memory a group needs.
template <class Job>
void run_lanes(const Job& job, int64_t batch, int64_t vectors, int threads) {
  const int bytes = lane_bytes();
  const int64_t lanes = bytes / int64_t(sizeof(typename Job::Scalar));
  const int64_t groups = (batch + lanes - 1) / lanes;
  if (threads > groups) threads = int(groups > 0 ? groups : 1);
#pragma omp parallel num_threads(threads)
  {
    const Arena arena(size_t(vectors) * bytes);
#pragma omp for schedule(dynamic, 1)
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = group * lanes;
      const int count = int(batch - first < lanes ? batch - first : lanes);
#if defined(__x86_64__) && defined(__GNUC__)
      if (bytes == 64) group_512(job, first, count, arena.get());
      if (bytes == 32) group_256(job, first, count, arena.get());
#endif
      if (bytes == 16) group_128(job, first, count, arena.get());
    }
  }
}

}  // namespace lora_kernels
