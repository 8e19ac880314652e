// Entry points behind the Python bindings. Addresses are of dense row-major arrays.
#pragma once

#include <cstdint>
#include <vector>

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

// The three skinny products of a LoRA layer, with dropout applied on the way (lora.cpp). The big operand is float32 or
// bfloat16, all else is float32; leading dimensions are in elements. Element (row, column) is dropped where its 16
// random bits are below `threshold`: Philox with 7 rounds, counter (column / 8, row, stream, 0), word (column % 8) / 2,
// low half first. Kept ones are multiplied by 65536 / (65536 - threshold); threshold 0 is no dropout.
struct Dropout {
  int threshold;  // 0 .. 65535
  uint64_t seed;
  uint32_t stream;
  int64_t first_row = 0;  // of the matrix whose rows are counted
};
// t = scale * drop(x) a^T
struct LoraShrink {
  const void* x;  // (tokens, columns)
  bool bfloat16;  // x
  int64_t x_stride;
  const float* a;  // (rank, columns)
  int64_t a_stride;
  float* t;  // (tokens, rank)
  int64_t t_stride;
  int64_t tokens, columns, rank;
  float scale;
  Dropout dropout;
};
void lora_shrink(const LoraShrink& job, int threads);
void lora_shrink(const std::vector<LoraShrink>& jobs, int threads);  // of one dtype, as one
// out = t^T drop(z)
struct LoraReduce {
  const float* t;  // (tokens, rank)
  int64_t t_stride;
  const void* z;  // (tokens, columns)
  bool bfloat16;  // z
  int64_t z_stride;
  float* out;  // (rank, columns)
  int64_t out_stride;
  int64_t tokens, columns, rank;
  Dropout dropout;
};
void lora_tsreduce(const LoraReduce& job, int threads);
void lora_tsreduce(const std::vector<LoraReduce>& jobs, int threads);  // of one dtype, as one
// y = base + mask(t b), where base is y, or the bias, or zero
struct LoraExpand {
  const float* t;  // (tokens, rank)
  int64_t t_stride;
  const float* b;  // (rank, columns)
  int64_t b_stride;
  void* y;  // (tokens, columns)
  bool bfloat16;  // y
  int64_t y_stride;
  int64_t tokens, columns, rank;
  bool accumulate;
  const float* bias;  // (columns,), or null
  Dropout dropout;
};
void lora_expand(const LoraExpand& job, int threads);
void lora_expand(const std::vector<LoraExpand>& jobs, int threads);  // of one dtype, as one

// A whole layer but for the product with its base weight, in the precision of x (float32 or bfloat16; sums are float32).
// Factors are dense. a0 and b0 are a frozen pair of more rank, not dropped.
struct LoraLayer {
  bool bfloat16, bfloat16_factors, bfloat16_frozen;  // of x, y and their gradients; of a and b; of a0 and b0
  int64_t tokens, inputs, outputs, rank, frozen_rank;
  const void *a, *b;    // (rank, inputs), (outputs, rank)
  const void *a0, *b0;  // (frozen_rank, inputs), (outputs, frozen_rank)
  float scale, frozen_scale;
  Dropout dropout;
};
// t = [scale drop(x) a^T, frozen_scale x a0^T]; y += t [b, b0]^T.
struct LoraForward {
  LoraLayer layer;
  const void* x;
  int64_t x_stride;
  float* t;  // (tokens, rank + frozen_rank), dense
  void* y;   // (tokens, outputs), dense
};
void lora_forward(const LoraForward& job, int threads);
// [u, u0] = [scale g b, frozen_scale g b0]; dx (+)= mask(u a) + u0 a0; da = u^T drop(x); db = g^T t. Null: not
// needed.
struct LoraBackward {
  LoraLayer layer;
  const void* g;
  int64_t g_stride;
  const void* x;  // for da
  int64_t x_stride;
  const float* t;  // for db, as lora_forward wrote it
  void* dx;        // (tokens, inputs), dense
  bool accumulate;
  float* da;  // (rank, inputs), dense
  float* db;  // (outputs, rank), dense
};
void lora_backward(const LoraBackward& job, int threads);

// DoRA (dora.cpp). out = w + b a: w float32 or bfloat16, all else float32.
struct DoraSum {
  const void* w;  // (rows, columns)
  bool bfloat16;  // w
  int64_t w_stride;
  const float* a;  // (rank, columns), dense
  const float* b;  // (rows, rank), dense
  float* out;      // (rows, columns), dense
  int64_t rows, columns, rank;
};
void dora_sum(const DoraSum& job, int threads);
// The gradients of y = scale * (product - inner): d_product = g * scale, out = sum over rows of g * (product - inner).
// Products and their gradients are float32 or bfloat16. Null: not needed, or an inner of zeros.
struct RescaledBackward {
  const void* product;  // (rows, columns), dense
  const void* g;
  bool bfloat16;
  int64_t g_stride;
  const float *scale, *inner;  // (columns,)
  void* d_product;             // (rows, columns), dense
  float* out;                  // (columns,)
  int64_t rows, columns;
};
void rescaled_backward(const RescaledBackward& job, int threads);

// The low-rank part of the linear layers of many experts, whose rows lie one expert after another (grouped_lora.cpp).
// Rows from the last offset on belong to none. Dropout counts the rows of x.
struct GroupedLora {
  bool bfloat16;           // of x, y and their gradients
  const int64_t* offsets;  // (experts + 1): from 0 on, not decreasing, at most `rows`
  int64_t experts, rows, inputs, outputs, rank;
  const float *a, *b;  // (experts, rank, inputs), (experts, outputs, rank), dense
  float scale;
  Dropout dropout;
};
// t = scale drop(x) a[e]^T; y += t b[e]^T
struct GroupedForward {
  GroupedLora layer;
  const void* x;
  int64_t x_stride;
  float* t;  // (rows, rank), dense
  void* y;   // (rows, outputs), dense
};
void grouped_lora_forward(const GroupedForward& job, int threads);
// u = scale g b[e]; dx = mask(u a[e]), or is increased by it; da[e] = u^T drop(x); db[e] = g^T t. Null: not needed.
struct GroupedBackward {
  GroupedLora layer;
  const void* g;
  int64_t g_stride;
  const void* x;  // for da
  int64_t x_stride;
  const float* t;  // for db, as grouped_lora_forward wrote it
  void* dx;        // (rows, inputs), dense
  bool accumulate;
  float* da;       // (experts, rank, inputs), dense
  float* db;       // (experts, outputs, rank), dense
};
void grouped_lora_backward(const GroupedBackward& job, int threads);

// One step of Adam on e = scale * (b grad_a + grad_b a), which is never stored, and the products of its direction
// h = avg_factor * m / (root_factor * sqrt(v) + eps) with both factors (lora_pro.cpp). Where the moments are bfloat16
// they are rounded by random bits as of Dropout, stream 0 for the first moment and 1 for the second, but with the
// counter (column / 8, row_offset + row, stream, step). All but the moments is float32, or float64 if they are.
struct LoraProAdam {
  void* exp_avg;     // m: (rows, columns)
  void* exp_avg_sq;  // v: (rows, columns)
  int dtype;         // 0 float32, 1 float64, 2 bfloat16
  int64_t avg_stride, square_stride;
  const void* a;       // (rank, columns)
  const void* grad_a;  // (rank, columns)
  const void* b;       // (rows, rank)
  const void* grad_b;  // (rows, rank)
  int64_t a_stride, grad_a_stride, b_stride, grad_b_stride;
  void* bt_h;  // scale * b^T h: (rank, columns), dense
  void* h_at;  // scale * h a^T: (rows, rank), dense
  int64_t rows, columns, rank;
  double scale, beta1, beta2, eps, avg_factor, root_factor;
  uint64_t seed;
  uint32_t step;
  int64_t row_offset;
  // Of many such matrices in a row, how far apart they are: elements, and rows for the random bits.
  int64_t batch, avg_batch, square_batch, a_batch, grad_a_batch, b_batch, grad_b_batch, row_step;
};
void lora_pro_adam(const LoraProAdam& job, int threads);

}  // namespace lora_kernels
