// What the skinny products of lora.cpp and lora_pro.cpp are made of: vectors, random bits, register tiles.
#pragma once

#include <cstring>
#include <type_traits>

#include "drivers.h"
#include "lanes.h"

// GCC does not see a 32 x 32 -> 64 bit product in a product of 64-bit lanes, nor widens 16-bit lanes in one go.
// Functions with these instructions are inlined into those compiled for a machine that has them.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LK_X86_ASM 1
#else
#define LK_X86_ASM 0
#endif

namespace lora_kernels {

template <int BYTES, class SCALAR = float>
struct Wide {
  typedef SCALAR S;
  static constexpr int bytes = BYTES;
  static constexpr int lanes = BYTES / int(sizeof(S));
  static constexpr int groups = BYTES / 8;  // of 64 bits: one Philox counter each, in whose low half words are computed
  // Accumulators of a tile are kVectors * kTile registers of 16 (SSE, AVX2) or 32 (AVX-512).
  static constexpr int kVectors = 3;
  static constexpr int kTile = BYTES == 64 ? 8 : 4;
  typedef S F __attribute__((vector_size(BYTES)));
  typedef std::conditional_t<sizeof(S) == 8, int64_t, int32_t> Lane;
  typedef Lane I __attribute__((vector_size(BYTES)));
  typedef std::make_unsigned_t<Lane> Bits __attribute__((vector_size(BYTES)));  // of F: a NaN's may carry over
  typedef uint64_t U __attribute__((vector_size(BYTES)));
  typedef uint16_t H __attribute__((vector_size(BYTES / 2)));
};
template <class L>
using WideOf = Wide<L::count * 8>;

template <class V, class T>
LK_HD V load(const T* address) {
  V x;
  std::memcpy(&x, address, sizeof x);
  return x;
}
template <class V, class T>
LK_HD void store(T* address, const V& x) {
  std::memcpy(address, &x, sizeof x);
}

struct BFloat16 {
  uint16_t bits;
};

// float from 16-bit numbers: their lanes widened.
template <class W>
LK_HD typename W::I widen_words(const void* address) {
#if LK_X86_ASM
  if constexpr (W::bytes >= 32) {
    typename W::I word;
    __asm__("vpmovzxwd %1, %0" : "=v"(word) : "m"(*static_cast<const typename W::H*>(address)));
    return word;
  }
#endif
  return __builtin_convertvector(load<typename W::H>(static_cast<const char*>(address)), typename W::I);
}
template <class W>
LK_HD typename W::F load_float(const float* address) {
  return load<typename W::F>(address);
}
template <class W>
LK_HD typename W::F load_float(const double* address) {
  return load<typename W::F>(address);
}
template <class W>
LK_HD typename W::F load_float(const BFloat16* address) {
  const typename W::I word = widen_words<W>(address) << 16;
  return load<typename W::F>(&word);
}
template <class W>
LK_HD void store_float(float* address, const typename W::F& x) {
  store(address, x);
}
// The low halves of 32-bit lanes.
template <class W>
LK_HD void store_words(BFloat16* address, const typename W::I& word) {
#if LK_X86_ASM
  if constexpr (W::bytes == 64) {
    typename W::H narrow;
    __asm__("vpmovdw %1, %0" : "=v"(narrow) : "v"(word));
    return store(address, narrow);
  }
#endif
  store(address, __builtin_convertvector(word, typename W::H));
}
// Rounds to nearest, ties to even; a NaN stays one.
template <class W>
LK_HD void store_float(BFloat16* address, const typename W::F& x) {
  using Bits = typename W::Bits;
  const auto bits = load<Bits>(&x);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  store_words<W>(address, x == x ? typename W::I(rounded) : typename W::I{} + 0x7fc0);
}
// Rounds up with the probability of what is cut off, by 16 random bits per lane; a NaN stays one.
template <class W>
LK_HD void store_stochastic(BFloat16* address, const typename W::F& x, const uint16_t* random) {
  using Bits = typename W::Bits;
  const Bits rounded = (load<Bits>(&x) + Bits(widen_words<W>(random))) >> 16;
  store_words<W>(address, x == x ? typename W::I(rounded) : typename W::I{} + 0x7fc0);
}
LK_HD float widen(float x) { return x; }
LK_HD float widen(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  return load<float>(&bits);
}

// Keeps GCC from reading a vector from memory once for each of its uses: tiles are bound by loads.
template <class W>
LK_HD void hold(typename W::F& x) {
#if LK_X86_ASM
  if constexpr (W::bytes >= 32) __asm__("" : "+v"(x));
#else
  (void)x;
#endif
}

// The products of the low halves of 64-bit lanes.
template <class W>
LK_HD typename W::U multiply_low(const typename W::U& x, uint32_t factor) {
  const typename W::U y = typename W::U{} + factor;
#if LK_X86_ASM
  if constexpr (W::bytes >= 32) {
    typename W::U product;
    __asm__("vpmuludq %2, %1, %0" : "=v"(product) : "v"(x), "v"(y));
    return product;
  }
#endif
  return (x & 0xffffffffu) * y;
}

// x where the 16 random bits keep it, else 0, whatever x is: a NaN that is dropped is gone (torch.nn.functional.dropout
// multiplies by 0, and a NaN stays).
template <class W>
LK_HD typename W::F keep(const typename W::F& x, const uint16_t* random, int threshold) {
  return widen_words<W>(random) >= threshold ? x : typename W::F{};
}

// Random bits of a matrix, 16 per element, row after row, addressed as in Dropout of drivers.h. Counters of a row
// differ in one word, the column; what the first three of the seven rounds make of it alone is the same in every row,
// and is kept in a table.
struct MaskSource {
  static constexpr int kRounds = 7;
  static constexpr int64_t kColumns = 64;  // granularity of the table: one step of the widest vectors
  static constexpr uint32_t kFactor0 = 0xD2511F53u, kFactor1 = 0xCD9E8D57u;
  uint32_t key0[kRounds], key1[kRounds], stream, first_row;
  int threshold;
  float factor;

  explicit MaskSource(const Dropout& dropout, uint32_t step = 0)
      : stream(dropout.stream), first_row(uint32_t(dropout.first_row)), threshold(dropout.threshold) {
    for (int round = 0; round < kRounds; ++round) {
      key0[round] = uint32_t(dropout.seed) + 0x9E3779B9u * uint32_t(round);
      key1[round] = uint32_t(dropout.seed >> 32) + 0xBB67AE85u * uint32_t(round);
    }
    key1[0] ^= step;  // the counter's fourth word meets this key alone
    factor = 65536.0f / float(65536 - threshold);
  }
  static size_t table_bytes(int64_t columns) { return size_t((columns + kColumns - 1) / kColumns * kColumns) * 4; }

  // Columns first .. last - 1 of the table; first is a multiple of kColumns.
  template <class W>
  LK_HD void fill_table(void* table, int64_t first, int64_t last) const {
    using U = typename W::U;
    for (int64_t column = first; column < last; column += W::bytes) {
      U group;
      for (int l = 0; l < W::groups; ++l) group[l] = uint64_t(column / 8 + l);
      const U p0 = multiply_low<W>(group, kFactor0);
      const U c2 = (p0 >> 32) ^ uint64_t(key1[0]);
      const U p1 = multiply_low<W>(c2, kFactor1);
      const uint32_t c1 = kFactor1 * stream;
      const U q0 = multiply_low<W>((p1 >> 32) ^ uint64_t(c1 ^ key0[1]), kFactor0);
      U* const entry = static_cast<U*>(table) + column / W::bytes * 4;
      entry[0] = p0;
      entry[1] = p1 ^ uint64_t(key0[2]);
      entry[2] = q0 >> 32;
      entry[3] = q0;
    }
  }

  // Bits of `row`, columns first .. last - 1, rounded up to whole vectors; first is a multiple of kColumns.
  template <class W>
  LK_HD void draw(const void* table, int64_t row, int64_t first, int64_t last, uint16_t* random) const {
    using U = typename W::U;
    const uint32_t c0 = uint32_t((uint64_t(kFactor1) * stream) >> 32) ^ (uint32_t(row) + first_row) ^ key0[0];
    const uint64_t product = uint64_t(kFactor0) * c0;
    const U row_high = U{} + uint64_t(uint32_t(product >> 32) ^ key1[1]);
    const U row_low = U{} + uint64_t(uint32_t(product) ^ key1[2]);
    const U* entry = static_cast<const U*>(table) + first / W::bytes * 4;
    U round_key0[kRounds], round_key1[kRounds];  // here, or they are read anew after every store
    for (int round = 3; round < kRounds; ++round) {
      round_key0[round] = U{} + uint64_t(key0[round]);
      round_key1[round] = U{} + uint64_t(key1[round]);
    }
    for (int64_t column = first; column < last; column += W::bytes, entry += 4, random += W::bytes) {
      // Upper halves of words hold rubbish, which no product reads.
      const U p = multiply_low<W>(row_high ^ entry[0], kFactor1);
      U w0 = (p >> 32) ^ entry[1], w1 = p, w2 = row_low ^ entry[2], w3 = entry[3];
#pragma GCC unroll 4
      for (int round = 3; round < kRounds; ++round) {
        const U p0 = multiply_low<W>(w0, kFactor0), p1 = multiply_low<W>(w2, kFactor1);
        w0 = (p1 >> 32) ^ w1 ^ round_key0[round];
        w2 = (p0 >> 32) ^ w3 ^ round_key1[round];
        w1 = p1;
        w3 = p0;
      }
      const U low = (w0 & 0xffffffffu) | (w1 << 32), high = (w2 & 0xffffffffu) | (w3 << 32);
      interleave<W>(low, high, random);
    }
  }

  // The 128 bits of one counter after those of another.
  template <class W>
  static LK_HD void interleave(const typename W::U& low, const typename W::U& high, uint16_t* random) {
#if defined(__GNUC__) && !defined(__clang__)
    using U = typename W::U;
    U first, second;
    for (int l = 0; l < W::groups; ++l) {
      first[l] = uint64_t(l / 2 + l % 2 * W::groups);
      second[l] = uint64_t(W::groups / 2 + l / 2 + l % 2 * W::groups);
    }
    store(random, U(__builtin_shuffle(low, high, first)));
    store(random + W::bytes / 2, U(__builtin_shuffle(low, high, second)));
#else
    uint64_t both[2 * W::groups];
    for (int l = 0; l < W::groups; ++l) {
      both[2 * l] = low[l];
      both[2 * l + 1] = high[l];
    }
    std::memcpy(random, both, sizeof both);
#endif
  }
};

// sum[m][v] = sum over s of p[s * p_stride + m] * q[s * q_stride + v], q's vectors masked by `random` or not.
template <class W, int M, int V, bool MASKED, class Q>
LK_HD void outer_tile(const typename W::S* p, int64_t p_stride, const Q* q, int64_t q_stride, int64_t steps,
                      const uint16_t* random, int64_t random_stride, int threshold, typename W::F (&sum)[M][V]) {
  using F = typename W::F;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[m][v] = F{};
  for (int64_t s = 0; s < steps; ++s) {
    F x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      x[v] = load_float<W>(q + v * W::lanes);
      if constexpr (MASKED) x[v] = keep<W>(x[v], random + v * W::lanes, threshold);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const F y = F{} + p[m];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[m][v] += y * x[v];
    }
    p += p_stride;
    q += q_stride;
    random += random_stride;
  }
}

// sum[i][j] += lane-wise products of row i of x and of column j of a, whose vectors lie beside each other.
template <class W, int ROWS, int COLUMNS>
LK_HD void inner_tile(const typename W::S* x, int64_t x_stride, const typename W::S* a, int64_t vectors,
                      typename W::S* sums, int64_t stride, bool fresh) {
  using F = typename W::F;
  F sum[ROWS][COLUMNS];
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) sum[i][j] = fresh ? F{} : load<F>(sums + i * stride + j * W::lanes);
  for (int64_t k = 0; k < vectors; ++k) {
    F row[ROWS];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) row[i] = load<F>(x + i * x_stride + k * W::lanes);
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) {
      F column = load<F>(a + (k * COLUMNS + j) * W::lanes);
      hold<W>(column);
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) sum[i][j] += row[i] * column;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) store(sums + i * stride + j * W::lanes, sum[i][j]);
}

// Lane l of the result is the sum of the lanes of vector l.
template <class W>
LK_HD typename W::F lane_sums(const typename W::S* vectors) {
  using F = typename W::F;
  F part[W::lanes];
  for (int l = 0; l < W::lanes; ++l) part[l] = load<F>(vectors + l * W::lanes);
#if defined(__GNUC__) && !defined(__clang__)
  // Alternate the lanes of two vectors, lower halves and upper halves: their sum holds both in half as many lanes. The
  // pairing of the last stage becomes the lowest bit of the lane.
  typename W::I lower, upper;
  for (int l = 0; l < W::lanes; ++l) {
    lower[l] = l / 2 + l % 2 * W::lanes;
    upper[l] = W::lanes / 2 + l / 2 + l % 2 * W::lanes;
  }
#pragma GCC unroll 4
  for (int half = W::lanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      part[i] = __builtin_shuffle(part[i], part[i + half], lower) + __builtin_shuffle(part[i], part[i + half], upper);
  return part[0];
#else
  F sum;
  for (int l = 0; l < W::lanes; ++l) {
    typename W::S total[W::lanes];
    store(total, part[l]);
    for (int half = W::lanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) total[i] += total[i + half];
    sum[l] = total[0];
  }
  return sum;
#endif
}

// Calls f with the constant that equals n in 1 .. LAST.
template <int N>
struct Constant {
  static constexpr int value = N;
};
template <int LAST, class Function>
LK_HD void with_constant(int n, const Function& function) {
  if constexpr (LAST > 1) {
    if (n < LAST) return with_constant<LAST - 1>(n, function);
  }
  function(Constant<LAST>{});
}

}  // namespace lora_kernels
