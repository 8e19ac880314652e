// CUDA driver of the small eigenproblems: one block per matrix, the matrix and its eigenvectors in shared memory.
//
// torch.linalg.eigh calls the library once per matrix for n > 32, a launch and a wait each (pytorch #174674); this is
// one launch for all of them. A round of the tournament rotates n / 2 disjoint pairs at once.
#include "cuda_launch.h"
#include "linalg.h"
#include "small_linalg.h"

namespace lora_kernels {
namespace {

constexpr int kMaxPairs = kMaxOrder / 2;

template <typename T>
__device__ T block_sum(T value, T* scratch) {
  const int tid = threadIdx.x;
  scratch[tid] = value;
  __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (tid < width) scratch[tid] += scratch[tid + width];
    __syncthreads();
  }
  const T total = scratch[0];
  __syncthreads();
  return total;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    eigh_kernel(const T* __restrict__ matrices, T* __restrict__ values, T* __restrict__ vectors,
                int* __restrict__ info, int n) {
  extern __shared__ unsigned char raw[];
  const int pitch = n | 1;  // odd: a column's entries lie in different banks, too
  T* const a = reinterpret_cast<T*>(raw);
  T* const v = a + n * pitch;  // row i: eigenvector i
  __shared__ T scratch[kThreads];
  __shared__ Rotation<Scalar<T>> turns[kMaxPairs];
  __shared__ int order[2 * kMaxPairs];
  const int tid = threadIdx.x;
  const T* const matrix = matrices + int64_t(blockIdx.x) * n * n;

  T largest = T(0);
  int bad = 0;
  for (int e = tid; e < n * n; e += kThreads) {
    const int i = e / n, j = e % n;
    const T x = matrix[i >= j ? e : j * n + i];
    a[i * pitch + j] = x;
    v[i * pitch + j] = i == j ? T(1) : T(0);
    bad |= !isfinite(x);
    largest = fmax(largest, fabs(x));
  }
  bad = __syncthreads_or(bad);
  scratch[tid] = largest;
  __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (tid < width) scratch[tid] = fmax(scratch[tid], scratch[tid + width]);
    __syncthreads();
  }
  const T scale = scratch[0] > T(0) && !bad ? scratch[0] : T(1);
  __syncthreads();
  T total = T(0);
  for (int e = tid; e < n * n; e += kThreads) {
    T& x = a[e / n * pitch + e % n];
    x = bad ? T(0) : x / scale;
    total += x * x;
  }
  const T threshold = jacobi_threshold(block_sum(total, scratch), n);

  const int players = n + (n & 1);
  int status = bad ? kNotFinite : kNotConverged;
  for (int sweep = 0; sweep <= kMaxSweeps; ++sweep) {
    T off = T(0);
    for (int e = tid; e < n * n; e += kThreads) {
      const T x = a[e / n * pitch + e % n];
      off += e / n == e % n ? T(0) : x * x;
    }
    if (block_sum(off, scratch) <= threshold) {
      status = bad ? kNotFinite : kOk;
      break;
    }
    for (int round = 0; round < players - 1; ++round) {
      for (int k = tid; k < players / 2; k += kThreads) {
        int p, q;
        tournament_pair(players, round, k, p, q);
        if (q >= n) continue;
        const T apq = a[p * pitch + q];
        turns[k] = jacobi_rotation<Scalar<T>>(a[p * pitch + p], a[q * pitch + q], apq, apq == T(0));
      }
      __syncthreads();
      for (int e = tid; e < players / 2 * n; e += kThreads) {  // rows of a, and eigenvectors
        int p, q;
        tournament_pair(players, round, e / n, p, q);
        if (q >= n) continue;
        const Rotation<Scalar<T>> turn = turns[e / n];
        const int i = p * pitch + e % n, j = q * pitch + e % n;
        const T x = a[i], y = a[j], u = v[i], w = v[j];
        a[i] = turn.first(x, y);
        a[j] = turn.second(x, y);
        v[i] = turn.first(u, w);
        v[j] = turn.second(u, w);
      }
      __syncthreads();
      for (int e = tid; e < players / 2 * n; e += kThreads) {  // columns of a
        int p, q;
        tournament_pair(players, round, e / n, p, q);
        if (q >= n) continue;
        const Rotation<Scalar<T>> turn = turns[e / n];
        const int row = e % n, i = row * pitch + p, j = row * pitch + q;
        const T x = a[i], y = a[j];
        a[i] = row == q ? T(0) : turn.first(x, y);
        a[j] = row == p ? T(0) : turn.second(x, y);
      }
      __syncthreads();
    }
  }
  for (int i = tid; i < n; i += kThreads) {  // rank of each eigenvalue among all
    int rank = 0;
    const T value = a[i * pitch + i];
    for (int j = 0; j < n; ++j) {
      const T other = a[j * pitch + j];
      rank += other < value || (other == value && j < i);
    }
    order[rank] = i;
  }
  __syncthreads();
  T* const my_values = values + int64_t(blockIdx.x) * n;
  T* const my_vectors = vectors + int64_t(blockIdx.x) * n * n;
  for (int k = tid; k < n; k += kThreads) my_values[k] = a[order[k] * (pitch + 1)] * scale;
  for (int e = tid; e < n * n; e += kThreads) my_vectors[e] = v[order[e % n] * pitch + e / n];
  if (tid == 0) info[blockIdx.x] = status;
}

size_t eigh_bytes(int n, int element_size) { return size_t(2) * n * (n | 1) * element_size; }

}  // namespace

template <typename T>
const char* eigh_cuda(const T* matrices, T* values, T* vectors, int* info, int64_t batch, int n, void* stream) {
  return launch(eigh_kernel<T>, batch, eigh_bytes(n, sizeof(T)), stream, matrices, values, vectors, info, n);
}

template const char* eigh_cuda<float>(const float*, float*, float*, int*, int64_t, int, void*);
template const char* eigh_cuda<double>(const double*, double*, double*, int*, int64_t, int, void*);

int eigh_cuda_limit(int element_size) {
  return element_size == sizeof(float) ? largest_order(eigh_kernel<float>, eigh_bytes, element_size)
                                       : largest_order(eigh_kernel<double>, eigh_bytes, element_size);
}

}  // namespace lora_kernels
