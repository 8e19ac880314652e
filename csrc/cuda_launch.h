// Launches of kernels that keep a matrix per block in dynamic shared memory, and the orders up to which they can.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace lora_kernels {

constexpr int kThreads = 256;
constexpr int kMaxOrder = 160;

// Returns a CUDA error text or null.
template <class Kernel, class... Arguments>
const char* launch(Kernel kernel, int64_t blocks, size_t shared, void* stream, Arguments... arguments) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error == cudaSuccess) {
    kernel<<<unsigned(blocks), kThreads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// The largest order whose `bytes(order, element_size)` fit the current device beside the kernel's static shared memory;
// 0 if there is no device, or none of the binaries is for it.
template <class Kernel>
int largest_order(Kernel kernel, size_t (*bytes)(int, int), int element_size) {
  int device = 0, there = 0;
  cudaFuncAttributes attributes{};
  if (cudaGetDevice(&device) != cudaSuccess || cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess ||
      cudaDeviceGetAttribute(&there, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
    cudaGetLastError();  // else the next launch, whoever's, would report it
    return 0;
  }
  int n = 0;
  while (n < kMaxOrder && bytes(n + 1, element_size) + attributes.sharedSizeBytes <= size_t(there)) ++n;
  return n;
}

}  // namespace lora_kernels
