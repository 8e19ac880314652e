// Entry points behind the Python bindings. Addresses are of dense row-major arrays.
#pragma once

#include <cstdint>

namespace lora_kernels {

// One pass over selected rows: widen to float, weigh, sum, square.
struct PackRows {
  const void* x;
  int dtype;             // 0 float32, 1 float16, 2 bfloat16
  int64_t row_stride;    // elements
  const int64_t* index;  // rows to take, or null for 0..rows-1
  int64_t rows;
  int64_t columns;
  const float* weight;         // w per taken row, or null
  float* panel;                // (rows, columns), or null
  float* weighted;             // (rows, columns) of w * x, or null
  float* column_sum;           // (columns,), += sum of w * x, or null
  const float* square_weight;  // v per taken row, or null; where it is zero the row is not squared, whatever it holds
  float* square_sum;           // (columns,), += sum of v * x^2, or null
};
void pack_rows(const PackRows& job, int threads);

// Random numbers addressed by position (Philox): standard normal draws, or signs.
struct RandomMatrix {
  float* out;  // (rows, columns)
  int64_t rows;
  int64_t columns;
  bool gaussian;
  uint64_t seed;
  uint32_t stream;
  uint32_t step;
};
void random_matrix(const RandomMatrix& job, int threads);

}  // namespace lora_kernels
