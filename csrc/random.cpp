// Matrices of random numbers from Philox 4x32 (Salmon et al., SC 2011), many counters at a time. The definition, word for
// word, is lora_kernels/ops/_philox.py; the float32 Box-Muller polynomials are those of lora_kernels/ops/_tl.py.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "drivers.h"
#include "lanes.h"

namespace lora_kernels {
namespace {

constexpr int kLanes = 16;
constexpr int kRounds = 10;

struct Words {
  uint32_t word[4][kLanes];
};

// Turns counters into random words, in place.
LK_HD void philox(Words& state, uint64_t seed) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t product0 = uint64_t(0xD2511F53u) * state.word[0][l];
      const uint64_t product1 = uint64_t(0xCD9E8D57u) * state.word[2][l];
      state.word[0][l] = uint32_t(product1 >> 32) ^ state.word[1][l] ^ key0;
      state.word[2][l] = uint32_t(product0 >> 32) ^ state.word[3][l] ^ key1;
      state.word[1][l] = uint32_t(product1);
      state.word[3][l] = uint32_t(product0);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

LK_HD float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
LK_HD uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
// word + 1/2. By halves, since only signed numbers convert to float in one vector instruction everywhere.
LK_HD float half_above(uint32_t word) {
  return (float(int32_t(word >> 16)) * 65536.0f + float(int32_t(word & 0xffff))) + 0.5f;
}

// sqrt(-2 ln u), u = (word + 1/2) / 2^32, to 4e-7. The logarithm is that of 1 + f for f in [sqrt(1/2) - 1, sqrt(2) - 1]:
// near u = 1, where float32 cannot tell u from 1, f is -(1 - u), which is known exactly from the complement of the word.
LK_HD float radius(uint32_t word) {
  const uint32_t bits = as_bits(half_above(word));
  const int32_t exponent = (int32_t(bits) - 0x3f3504f3) >> 23;
  const bool near_one = word >= 0xB504F334u;
  const float f = near_one ? half_above(~word) * -0x1p-32f : as_float(bits - (uint32_t(exponent) << 23)) - 1.0f;
  const float e = near_one ? 0.0f : float(exponent - 32);
  float p = -0.0785954578f;
  p = p * f + 0.128816224f;
  p = p * f - 0.131287677f;
  p = p * f + 0.141811961f;
  p = p * f - 0.166245531f;
  p = p * f + 0.200022861f;
  p = p * f - 0.250008104f;
  p = p * f + 0.333333167f;
  const float square = f * f;
  const float log1p = f - 0.5f * square + square * f * p;
  // ln 2 in two parts, of which the first is short: its product with e is exact.
  return std::sqrt(-2.0f * (e * 0.693359375f + (e * -2.12194440e-4f + log1p)));
}

// Cosine and sine of 2 pi (word + 1/2) / 2^32, to 1e-7: the nearest quarter turn, and polynomials for the rest.
LK_HD void turn(uint32_t word, float& cosine, float& sine) {
  const uint32_t quarter = (word + 0x20000000u) >> 30;
  const float x = (float(int32_t(word - (quarter << 30))) + 0.5f) * 0x1p-32f;  // turns, at most 1/8
  const float square = x * x;
  float s = -75.4020678f;
  s = s * square + 81.5925535f;
  s = s * square - 41.3416626f;
  s = x * 6.28125f + x * (0.0019353072f + square * s);
  float c = 59.2459618f;
  c = c * square - 85.4437417f;
  c = c * square + 64.9393265f;
  c = c * square - 19.7392087f;
  c = 1.0f + square * c;
  const bool odd = quarter & 1;
  cosine = as_float(as_bits(odd ? s : c) ^ ((quarter + 1) & 2) << 30);
  sine = as_float(as_bits(odd ? c : s) ^ (quarter & 2) << 30);
}

// Counters `first`, `first + 1`, ... of a matrix with `groups` counters per row.
struct Block {
  Words words;
  int64_t row[kLanes], group[kLanes];
  int count;
};

LK_HD void draw(const RandomMatrix& job, int64_t first, int64_t groups, Block& block) {
  block.count = int(std::min<int64_t>(kLanes, job.rows * groups - first));
  int64_t row = first / groups, group = first % groups;
  for (int l = 0; l < kLanes; ++l) {
    block.row[l] = row;
    block.group[l] = group;
    block.words.word[0][l] = uint32_t(group);
    block.words.word[1][l] = uint32_t(row);
    block.words.word[2][l] = job.stream;
    block.words.word[3][l] = job.step;
    if (++group == groups) group = 0, ++row;
  }
  philox(block.words, job.seed);
}

LK_HD void normal_block(const RandomMatrix& job, int64_t first, int64_t groups) {
  Block block;
  draw(job, first, groups, block);
  float z[4][kLanes], four[kLanes][4];
  for (int pair = 0; pair < 4; pair += 2)
    for (int l = 0; l < kLanes; ++l) {
      float cosine, sine;
      turn(block.words.word[pair + 1][l], cosine, sine);
      const float r = radius(block.words.word[pair][l]);
      z[pair][l] = r * cosine;
      z[pair + 1][l] = r * sine;
    }
  for (int w = 0; w < 4; ++w)
    for (int l = 0; l < kLanes; ++l) four[l][w] = z[w][l];
  for (int l = 0; l < block.count; ++l) {
    const int64_t column = block.group[l] * 4;
    std::memcpy(job.out + block.row[l] * job.columns + column, four[l],
                sizeof(float) * std::min<int64_t>(4, job.columns - column));
  }
}

LK_HD void sign_block(const RandomMatrix& job, int64_t first, int64_t groups) {
  Block block;
  draw(job, first, groups, block);
  for (int l = 0; l < block.count; ++l)
    for (int w = 0; w < 4; ++w) {
      const int64_t column = block.group[l] * 128 + w * 32;
      const uint32_t word = block.words.word[w][l];
      float* const out = job.out + block.row[l] * job.columns + column;
      const int width = int(std::min<int64_t>(32, job.columns - column));  // negative past the last column
      for (int bit = 0; bit < width; ++bit) out[bit] = as_float(0x3f800000u | (word >> bit) << 31);
    }
}

struct Draw {
  const RandomMatrix& job;
  int64_t groups;
  template <class L>
  LK_HD void group(int64_t block, int, void*) const {
    if (job.gaussian)
      normal_block(job, block * kLanes, groups);
    else
      sign_block(job, block * kLanes, groups);
  }
};

}  // namespace

void random_matrix(const RandomMatrix& job, int threads) {
  const int64_t width = job.gaussian ? 4 : 128;
  const int64_t groups = (job.columns + width - 1) / width;
  const int64_t blocks = (job.rows * groups + kLanes - 1) / kLanes;
  // Waking a thread takes longer than a few blocks do.
  const int wanted = int(std::min<int64_t>(threads, (blocks + 31) / 32));
  const int bytes = lane_bytes();
#pragma omp parallel for num_threads(std::max(wanted, 1)) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) run_group(Draw{job, groups}, block, 1, nullptr, bytes);
}

}  // namespace lora_kernels
