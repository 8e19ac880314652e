// The low-rank part of many experts on the CPU: the skinny products of lora.cpp, of all experts at once, so that threads
// share the tasks of all and not those of one after the other.
#include <algorithm>

#include "drivers.h"
#include "lora_tasks.h"

namespace lora_kernels {
namespace {

// The rows of an expert.
struct Group {
  int64_t expert, first, count;
};

std::vector<Group> groups_of(const GroupedLora& l) {
  std::vector<Group> groups;
  for (int64_t e = 0; e < l.experts; ++e) groups.push_back({e, l.offsets[e], l.offsets[e + 1] - l.offsets[e]});
  return groups;
}

const void* row_of(const GroupedLora& l, const void* matrix, int64_t row, int64_t stride) {
  return static_cast<const char*>(matrix) + row * stride * (l.bfloat16 ? 2 : 4);
}
void* row_of(const GroupedLora& l, void* matrix, int64_t row, int64_t stride) {
  return static_cast<char*>(matrix) + row * stride * (l.bfloat16 ? 2 : 4);
}

// (experts, rows, columns) to (experts, columns, rows).
void transpose_all(const float* from, int64_t experts, int64_t rows, int64_t columns, float* to, int threads) {
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, experts * rows * columns >> 16)));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t e = 0; e < experts; ++e) {
    const float* const source = from + e * rows * columns;
    float* const target = to + e * rows * columns;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < columns; ++c) target[c * rows + i] = source[i * columns + c];
  }
}

Dropout dropout_of(const GroupedLora& l, const Group& group) {
  Dropout dropout = l.dropout;
  dropout.first_row = group.first;
  return dropout;
}

constexpr Dropout kNone{0, 0, 0};

}  // namespace

void grouped_lora_forward(const GroupedForward& job, int threads) {
  const GroupedLora& l = job.layer;
  const Arena memory(size_t(l.experts * l.rank * l.outputs) * sizeof(float), 1);
  float* const right = static_cast<float*>(memory.part(0));
  transpose_all(l.b, l.experts, l.outputs, l.rank, right, threads);
  std::vector<LoraShrink> shrinks;
  std::vector<LoraExpand> expands;
  for (const Group& group : groups_of(l)) {
    if (group.count == 0) continue;
    float* const t = job.t + group.first * l.rank;
    shrinks.push_back({row_of(l, job.x, group.first, job.x_stride), l.bfloat16, job.x_stride,
                       l.a + group.expert * l.rank * l.inputs, l.inputs, t, l.rank, group.count, l.inputs, l.rank,
                       l.scale, dropout_of(l, group)});
    expands.push_back({t, l.rank, right + group.expert * l.rank * l.outputs, l.outputs,
                       row_of(l, job.y, group.first, l.outputs), l.bfloat16, l.outputs, group.count, l.outputs, l.rank,
                       true, nullptr, kNone});
  }
  const int64_t covered = l.offsets[l.experts];
  std::fill_n(job.t + covered * l.rank, (l.rows - covered) * l.rank, 0.0f);
  lora_shrink(shrinks, threads);
  lora_expand(expands, threads);
}

void grouped_lora_backward(const GroupedBackward& job, int threads) {
  const GroupedLora& l = job.layer;
  const std::vector<Group> groups = groups_of(l);
  const int64_t factor = l.rank * l.outputs;
  if (job.dx || job.da) {
    const Arena memory(size_t(l.experts * factor + l.rows * l.rank) * sizeof(float), 1);
    float* const right = static_cast<float*>(memory.part(0));
    float* const u = right + l.experts * factor;
    transpose_all(l.b, l.experts, l.outputs, l.rank, right, threads);
    std::vector<LoraShrink> shrinks;
    std::vector<LoraReduce> reduces;
    std::vector<LoraExpand> expands;
    for (const Group& group : groups) {
      float* const rows = u + group.first * l.rank;
      const Dropout dropout = dropout_of(l, group);
      if (job.da)
        reduces.push_back({rows, l.rank, row_of(l, job.x, group.first, job.x_stride), l.bfloat16, job.x_stride,
                           job.da + group.expert * l.rank * l.inputs, l.inputs, group.count, l.inputs, l.rank,
                           dropout});
      if (group.count == 0) continue;
      shrinks.push_back({row_of(l, job.g, group.first, job.g_stride), l.bfloat16, job.g_stride,
                         right + group.expert * factor, l.outputs, rows, l.rank, group.count, l.outputs, l.rank,
                         l.scale, kNone});
      if (job.dx)
        expands.push_back({rows, l.rank, l.a + group.expert * l.rank * l.inputs, l.inputs,
                           row_of(l, job.dx, group.first, l.inputs), l.bfloat16, l.inputs, group.count, l.inputs,
                           l.rank, job.accumulate, nullptr, dropout});
    }
    lora_shrink(shrinks, threads);
    lora_tsreduce(reduces, threads);
    lora_expand(expands, threads);
    if (job.dx && !job.accumulate) {
      const int64_t covered = l.offsets[l.experts];
      std::fill_n(static_cast<char*>(row_of(l, job.dx, covered, l.inputs)),
                  (l.rows - covered) * l.inputs * (l.bfloat16 ? 2 : 4), char(0));
    }
  }
  if (job.db) {
    const Arena memory(size_t(l.experts * factor) * sizeof(float), 1);
    float* const sums = static_cast<float*>(memory.part(0));
    std::vector<LoraReduce> reduces;
    for (const Group& group : groups)
      reduces.push_back({job.t + group.first * l.rank, l.rank, row_of(l, job.g, group.first, job.g_stride), l.bfloat16,
                         job.g_stride, sums + group.expert * factor, l.outputs, group.count, l.outputs, l.rank, kNone});
    lora_tsreduce(reduces, threads);
    transpose_all(sums, l.experts, l.rank, l.outputs, job.db, threads);
  }
}

}  // namespace lora_kernels
