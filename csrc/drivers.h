// Entry points behind the Python bindings. Addresses are of dense row-major arrays.
#pragma once

#include <cstdint>

namespace lora_kernels {

// One pass over selected rows: widen to float, weigh, sum.
struct PackRows {
  const void* x;
  int dtype;             // 0 float32, 1 float16, 2 bfloat16
  int64_t row_stride;    // elements
  const int64_t* index;  // rows to take, or null for 0..rows-1
  int64_t rows;
  int64_t columns;
  const float* weight;  // per taken row, or null
  float* panel;         // (rows, columns), or null
  float* weighted;      // (rows, columns) of w * x, or null
  float* column_sum;    // (columns,), += sum of w * x, or null
};
void pack_rows(const PackRows& job, int threads);

}  // namespace lora_kernels
