// CUDA drivers of Cholesky, Sylvester and singular values: one block per matrix or problem, in shared memory.
//
// A launch for the whole batch, where the libraries launch, and often wait, once per matrix.
#include "cuda_launch.h"
#include "linalg.h"
#include "small_linalg.h"

namespace lora_kernels {
namespace {

constexpr int kColumns = 32;  // right-hand sides of a block

// Entry (i, j), j <= i, of a packed lower triangle.
__device__ __forceinline__ int packed(int i, int j) { return i * (i + 1) / 2 + j; }

template <typename T>
__global__ void __launch_bounds__(kThreads)
    cholesky_kernel(const T* __restrict__ matrices, T* __restrict__ factors, int* __restrict__ info, int n) {
  extern __shared__ unsigned char raw[];
  T* const a = reinterpret_cast<T*>(raw);  // packed lower triangle
  const int tid = threadIdx.x;
  const int64_t base = int64_t(blockIdx.x) * n * n;
  int bad = 0;
  for (int e = tid; e < n * n; e += kThreads) {
    const int i = e / n, j = e % n;
    if (j > i) continue;
    const T x = matrices[base + e];
    a[packed(i, j)] = x;
    bad |= !isfinite(x);
  }
  bad = __syncthreads_or(bad);
  int minor = 0;
  for (int j = 0; j < n; ++j) {
    // Every thread takes the same root; the pivot itself is overwritten only behind the barrier.
    const T square = a[packed(j, j)];
    const bool positive = square > T(0);
    if (!positive && minor == 0) minor = j + 1;
    const T inverse = positive ? Scalar<T>::inverse_root(square) : T(1);
    __syncthreads();
    for (int i = j + tid; i < n; i += kThreads) a[packed(i, j)] = i == j ? square * inverse : a[packed(i, j)] * inverse;
    __syncthreads();
    const int rest = n - j - 1;
    for (int e = tid; e < rest * rest; e += kThreads) {
      const int i = j + 1 + e / rest, k = j + 1 + e % rest;
      if (k <= i) a[packed(i, k)] -= a[packed(i, j)] * a[packed(k, j)];
    }
    __syncthreads();
  }
  for (int e = tid; e < n * n; e += kThreads) {
    const int i = e / n, j = e % n;
    factors[base + e] = j <= i ? a[packed(i, j)] : T(0);
  }
  if (tid == 0) info[blockIdx.x] = bad ? kNotFinite : minor ? kNotPositive + minor - 1 : kOk;
}

// One block per matrix and kColumns right-hand sides; a warp is one row of them.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    substitute_kernel(const T* __restrict__ factors, const T* __restrict__ rhs, T* __restrict__ out, int n,
                      int64_t columns, int64_t tiles) {
  extern __shared__ unsigned char raw[];
  T* const l = reinterpret_cast<T*>(raw);  // packed lower triangle, inverse diagonal
  T* const x = l + n * (n + 1) / 2;        // (n, kColumns)
  const int tid = threadIdx.x, lane = tid % kColumns, warp = tid / kColumns;
  constexpr int kWarps = kThreads / kColumns;
  const int64_t b = blockIdx.x / tiles, column = blockIdx.x % tiles * kColumns + lane;
  for (int e = tid; e < n * n; e += kThreads) {
    const int i = e / n, j = e % n;
    const T entry = factors[b * n * n + e];
    if (j <= i) l[packed(i, j)] = i == j ? T(1) / entry : entry;
  }
  for (int i = warp; i < n; i += kWarps)
    x[i * kColumns + lane] = column < columns ? rhs[(b * n + i) * columns + column] : T(0);
  __syncthreads();
  for (int j = 0; j < n; ++j) {
    const T value = x[j * kColumns + lane] * l[packed(j, j)];
    __syncthreads();
    if (warp == 0) x[j * kColumns + lane] = value;
    for (int i = j + 1 + warp; i < n; i += kWarps) x[i * kColumns + lane] -= l[packed(i, j)] * value;
    __syncthreads();
  }
  for (int j = n - 1; j >= 0; --j) {
    const T value = x[j * kColumns + lane] * l[packed(j, j)];
    __syncthreads();
    if (warp == 0) x[j * kColumns + lane] = value;
    for (int i = warp; i < j; i += kWarps) x[i * kColumns + lane] -= l[packed(j, i)] * value;
    __syncthreads();
  }
  if (column < columns)
    for (int i = warp; i < n; i += kWarps) out[(b * n + i) * columns + column] = x[i * kColumns + lane];
}

// X = P [ (P^T R Q)_ij / (p_i + q_j) ] Q^T. `out` holds every second product on the way.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sylvester_kernel(const T* __restrict__ p_values, const T* __restrict__ p_vectors, const T* __restrict__ q_values,
                     const T* __restrict__ q_vectors, const T* __restrict__ rhs, T* out, int* __restrict__ info, int r,
                     int k) {
  extern __shared__ unsigned char raw[];
  T* const w = reinterpret_cast<T*>(raw);  // (r, k)
  const int tid = threadIdx.x;
  const int64_t b = blockIdx.x;
  const T* const p = p_values + b * r;
  const T* const q = q_values + b * k;
  const T* const u = p_vectors + b * r * r;
  const T* const v = q_vectors + b * k * k;
  const T* const f = rhs + b * r * k;
  T* const x = out + b * r * k;
  int bad = 0;
  for (int e = tid; e < r * k; e += kThreads) bad |= !isfinite(f[e]);
  bad = __syncthreads_or(bad);
  for (int e = tid; e < r * k; e += kThreads) {
    T sum = T(0);
    for (int a = 0; a < r; ++a) sum += u[a * r + e / k] * f[a * k + e % k];
    w[e] = sum;
  }
  __syncthreads();
  const T largest_p = fmax(fabs(p[0]), fabs(p[r - 1])), largest_q = fmax(fabs(q[0]), fabs(q[k - 1]));
  const T zero = sylvester_threshold(largest_p, largest_q, Limits<T>::epsilon, r > k ? r : k);
  for (int e = tid; e < r * k; e += kThreads) {
    const int i = e / k, j = e % k;
    T sum = T(0);
    for (int c = 0; c < k; ++c) sum += w[i * k + c] * v[c * k + j];
    const T divisor = p[i] + q[j];
    x[e] = fabs(divisor) <= zero ? T(0) : sum / divisor;
  }
  __syncthreads();
  for (int e = tid; e < r * k; e += kThreads) {
    const int i = e / k, j = e % k;
    T sum = T(0);
    for (int c = 0; c < k; ++c) sum += x[i * k + c] * v[j * k + c];
    w[e] = sum;
  }
  __syncthreads();
  for (int e = tid; e < r * k; e += kThreads) {
    T sum = T(0);
    for (int a = 0; a < r; ++a) sum += u[e / k * r + a] * w[a * k + e % k];
    x[e] = sum;
  }
  if (tid == 0) info[b] = bad ? kNotFinite : kOk;
}

__device__ __forceinline__ double warp_sum(double x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// One-sided Jacobi on the rows; a warp rotates a pair, and a round of the tournament rotates n / 2 disjoint pairs.
__global__ void __launch_bounds__(kThreads)
    singular_values_kernel(const double* __restrict__ matrices, double* __restrict__ values, int* __restrict__ info,
                           int n) {
  extern __shared__ unsigned char raw[];
  double* const a = reinterpret_cast<double*>(raw);
  __shared__ double norms[kMaxOrder];
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  constexpr int kWarps = kThreads / 32;
  constexpr double epsilon = Limits<double>::epsilon;
  const int64_t base = int64_t(blockIdx.x) * n * n;
  int bad = 0;
  for (int e = tid; e < n * n; e += kThreads) {
    a[e] = matrices[base + e];
    bad |= !isfinite(a[e]);
  }
  bad = __syncthreads_or(bad);
  const auto square_rows = [&] {
    for (int i = warp; i < n; i += kWarps) {
      double square = 0;
      for (int c = lane; c < n; c += 32) square += a[i * n + c] * a[i * n + c];
      square = warp_sum(square);
      if (lane == 0) norms[i] = square;
    }
    __syncthreads();
  };
  square_rows();
  double total = 0;
  for (int i = 0; i < n; ++i) total += norms[i];
  const double noise = null_square(total, epsilon);
  const int players = n + (n & 1);
  int status = kNotConverged;
  for (int sweep = 0; sweep <= kMaxSweeps && !bad; ++sweep) {
    int turned = 0;
    for (int round = 0; round < players - 1; ++round) {
      for (int pair = warp; pair < players / 2; pair += kWarps) {
        int p, q;
        tournament_pair(players, round, pair, p, q);
        if (q >= n) continue;
        double xx = 0, yy = 0, xy = 0;
        for (int c = lane; c < n; c += 32) {
          const double x = a[p * n + c], y = a[q * n + c];
          xx += x * x;
          yy += y * y;
          xy += x * y;
        }
        xx = warp_sum(xx);
        yy = warp_sum(yy);
        xy = warp_sum(xy);
        if (orthogonal(xx, yy, xy, noise, epsilon, n)) continue;
        turned = 1;
        const Rotation<Scalar<double>> turn = jacobi_rotation<Scalar<double>>(xx, yy, xy, false);
        for (int e = lane; e < n; e += 32) {
          const double x = a[p * n + e], y = a[q * n + e];
          a[p * n + e] = turn.first(x, y);
          a[q * n + e] = turn.second(x, y);
        }
      }
      __syncthreads();
    }
    if (!__syncthreads_or(turned)) {
      status = kOk;
      break;
    }
  }
  __syncthreads();  // without a sweep (bad input) some may still read the norms
  square_rows();
  for (int i = tid; i < n; i += kThreads) {  // place of each value in descending order
    int rank = 0;
    for (int j = 0; j < n; ++j) rank += norms[j] > norms[i] || (norms[j] == norms[i] && j < i);
    if (bad) rank = i;  // NaN has no order
    values[int64_t(blockIdx.x) * n + rank] = sqrt(norms[i]);
  }
  if (tid == 0) info[blockIdx.x] = bad ? kNotFinite : status;
}

size_t triangle_bytes(int n, int element_size) { return size_t(n) * (n + 1) / 2 * element_size; }
size_t substitute_bytes(int n, int element_size) {
  return triangle_bytes(n, element_size) + size_t(n) * kColumns * element_size;
}
size_t square_bytes(int n, int element_size) { return size_t(n) * n * element_size; }

}  // namespace

template <typename T>
const char* cholesky_cuda(const T* matrices, T* factors, int* info, int64_t batch, int n, void* stream) {
  return launch(cholesky_kernel<T>, batch, triangle_bytes(n, sizeof(T)), stream, matrices, factors, info, n);
}

template <typename T>
const char* cholesky_substitute_cuda(const T* factors, const T* rhs, T* out, int64_t batch, int n, int64_t columns,
                                     void* stream) {
  const int64_t tiles = (columns + kColumns - 1) / kColumns;
  return launch(substitute_kernel<T>, batch * tiles, substitute_bytes(n, sizeof(T)), stream, factors, rhs, out, n,
                columns, tiles);
}

template <typename T>
const char* sylvester_rotate_cuda(const T* p_values, const T* p_vectors, const T* q_values, const T* q_vectors,
                                  const T* rhs, T* out, int* info, int64_t batch, int r, int k, void* stream) {
  return launch(sylvester_kernel<T>, batch, size_t(r) * k * sizeof(T), stream, p_values, p_vectors, q_values,
                q_vectors, rhs, out, info, r, k);
}

const char* singular_values_cuda(const double* matrices, double* values, int* info, int64_t batch, int n,
                                 void* stream) {
  return launch(singular_values_kernel, batch, square_bytes(n, sizeof(double)), stream, matrices, values, info, n);
}

#define LK_INSTANTIATE(T)                                                                                     \
  template const char* cholesky_cuda<T>(const T*, T*, int*, int64_t, int, void*);                             \
  template const char* cholesky_substitute_cuda<T>(const T*, const T*, T*, int64_t, int, int64_t, void*);     \
  template const char* sylvester_rotate_cuda<T>(const T*, const T*, const T*, const T*, const T*, T*, int*,   \
                                                int64_t, int, int, void*);
LK_INSTANTIATE(float)
LK_INSTANTIATE(double)

int cholesky_cuda_limit(int element_size) {
  return element_size == sizeof(float) ? largest_order(substitute_kernel<float>, substitute_bytes, element_size)
                                       : largest_order(substitute_kernel<double>, substitute_bytes, element_size);
}
int sylvester_cuda_limit(int element_size) {
  return element_size == sizeof(float) ? largest_order(sylvester_kernel<float>, square_bytes, element_size)
                                       : largest_order(sylvester_kernel<double>, square_bytes, element_size);
}
int singular_values_cuda_limit(int element_size) {
  return largest_order(singular_values_kernel, square_bytes, element_size);
}

}  // namespace lora_kernels
