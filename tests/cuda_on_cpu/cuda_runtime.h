// CUDA kernels on a CPU: a block is as many threads, its barriers are barriers, shared memory is one buffer.
//
// For thread, address and undefined-behaviour sanitizers, and for a count of bank conflicts: shared arrays of the type
// `shim::Shared` note the address of every access, and the k-th accesses of a warp's threads behind one barrier are
// taken for one instruction. tests/cuda_on_cpu/build.py rewrites the declarations and launches of csrc/*.cu.
#pragma once

#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

using std::fabs, std::fmax, std::isfinite;

typedef int cudaError_t;
typedef void* cudaStream_t;
constexpr int cudaSuccess = 0;
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaDevAttrMaxSharedMemoryPerBlockOptin };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
inline const char* cudaGetErrorString(int) { return ""; }
inline int cudaGetLastError() { return 0; }
template <class Kernel>
int cudaFuncSetAttribute(Kernel, int, int) {
  return 0;
}
template <class Kernel>
int cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return 0;
}
inline int cudaGetDevice(int* device) { return *device = 0; }
inline int cudaDeviceGetAttribute(int* value, int, int) {
  *value = 232448;
  return 0;
}

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx;

namespace shim {

constexpr int kWarp = 32, kBanks = 32, kWord = 4;

struct Access {
  uintptr_t address;
  int size;
};
// Of a thread, the accesses behind each barrier.
using Trace = std::vector<std::vector<Access>>;

struct Block {
  explicit Block(int threads) : all(threads), lanes(threads), traces(threads, Trace(1)) {
    for (int i = 0; i < threads / kWarp; ++i) warps.push_back(std::make_unique<std::barrier<>>(kWarp));
  }
  std::barrier<> all;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<double> lanes;
  std::atomic<int> votes[2] = {0, 0};
  std::vector<Trace> traces;
};

inline unsigned char* memory = nullptr;
inline Block* block = nullptr;
inline thread_local int phase = 0;
// Wavefronts that the accesses of warps take, and that they would take without bank conflicts.
inline int64_t wavefronts = 0, ideal = 0;
inline bool tracing = false;

template <class T>
struct Shared {
  T* data;
  T& operator[](int i) const {
    if (tracing) block->traces[threadIdx.x].back().push_back({uintptr_t(data + i), int(sizeof(T))});
    return data[i];
  }
  Shared operator+(int i) const { return {data + i}; }
};

inline void count_wavefronts(const std::vector<Trace>& traces) {
  for (size_t warp = 0; warp < traces.size(); warp += kWarp)
    for (size_t interval = 0; interval < traces[warp].size(); ++interval)
      for (size_t k = 0;; ++k) {
        std::map<int, std::set<uintptr_t>> words;  // of each bank
        std::set<uintptr_t> distinct;
        for (size_t thread = warp; thread < warp + kWarp; ++thread) {
          const auto& accesses = traces[thread][interval];
          if (k >= accesses.size()) continue;
          for (int byte = 0; byte < accesses[k].size; byte += kWord) {
            const uintptr_t word = (accesses[k].address + byte) / kWord;
            words[word % kBanks].insert(word);
            distinct.insert(word);
          }
        }
        if (distinct.empty()) break;
        size_t most = 0;
        for (const auto& [bank, set] : words) most = std::max(most, set.size());
        wavefronts += most;
        ideal += (distinct.size() + kBanks - 1) / kBanks;
      }
}

template <class Kernel, class... Arguments>
void launch(Kernel kernel, unsigned blocks, int threads, size_t shared, Arguments... arguments) {
  for (unsigned number = 0; number < blocks; ++number) {
    std::unique_ptr<unsigned char[]> bytes(new unsigned char[shared + 128]);  // so that its end is guarded
    memory = bytes.get() + (128 - uintptr_t(bytes.get()) % 128) % 128;
    std::memset(memory, 0xff, shared);  // NaN
    Block current(threads);
    block = &current;
    std::vector<std::thread> running;
    for (int i = 0; i < threads; ++i)
      running.emplace_back([=] {
        threadIdx.x = i, blockIdx.x = number, phase = 0;
        kernel(arguments...);
      });
    for (auto& thread : running) thread.join();
    if (tracing) count_wavefronts(current.traces);
  }
}

}  // namespace shim

inline void __syncthreads() {
  if (shim::tracing) shim::block->traces[threadIdx.x].emplace_back();
  shim::block->all.arrive_and_wait();
}

inline int __syncthreads_or(int value) {
  const int phase = shim::phase;
  shim::phase ^= 1;
  if (value) shim::block->votes[phase].store(1);
  __syncthreads();
  const int result = shim::block->votes[phase].load();
  shim::block->all.arrive_and_wait();
  if (threadIdx.x == 0) shim::block->votes[phase].store(0);
  return result;
}

inline double __shfl_xor_sync(unsigned, double value, int offset) {
  auto& warp = *shim::block->warps[threadIdx.x / shim::kWarp];
  shim::block->lanes[threadIdx.x] = value;
  warp.arrive_and_wait();
  const double other = shim::block->lanes[threadIdx.x ^ offset];
  warp.arrive_and_wait();
  return other;
}
