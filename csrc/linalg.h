// Drivers of the small dense algebra. Addresses are of dense row-major arrays; `batch` matrices or problems lie one
// behind the other. Square matrices are of order n; of symmetric ones the lower triangle is read.
#pragma once

#include <cstdint>

namespace lora_kernels {

// The first problem found: a Status (small_linalg.h) and the index of the matrix it concerns.
struct Outcome {
  int status;
  int64_t index;
};

// Eigenvalues ascending, eigenvectors as columns, with the signs of reference.py.
template <typename T>
Outcome eigh_cpu(const T* matrices, T* values, T* vectors, int64_t batch, int n, int threads);
// Lower Cholesky factors, zero above the diagonal.
template <typename T>
Outcome cholesky_cpu(const T* matrices, T* factors, int64_t batch, int n, int threads);
// matrices x = rhs for (n, columns) right-hand sides.
template <typename T>
Outcome cholesky_solve_cpu(const T* matrices, const T* rhs, T* out, int64_t batch, int n, int64_t columns,
                           int threads);
// p x + x q = rhs with symmetric p (r, r) and q (k, k).
template <typename T>
Outcome sylvester_cpu(const T* p, const T* q, const T* rhs, T* out, int64_t batch, int r, int k, int threads);
// Singular values of square matrices, descending.
Outcome singular_values_cpu(const double* matrices, double* values, int64_t batch, int n, int threads);

#ifdef LK_WITH_CUDA
// The same on the device, asynchronously; info[b] gets the Status of matrix b. Return a CUDA error text or null.
// Here the signs of eigenvectors are as they come.
template <typename T>
const char* eigh_cuda(const T* matrices, T* values, T* vectors, int* info, int64_t batch, int n, void* stream);
template <typename T>
const char* cholesky_cuda(const T* matrices, T* factors, int* info, int64_t batch, int n, void* stream);
// The second half of a solve: factors factors^T x = rhs.
template <typename T>
const char* cholesky_substitute_cuda(const T* factors, const T* rhs, T* out, int64_t batch, int n, int64_t columns,
                                     void* stream);
// The second half of a Sylvester solve, from the eigenpairs of p and of q.
template <typename T>
const char* sylvester_rotate_cuda(const T* p_values, const T* p_vectors, const T* q_values, const T* q_vectors,
                                  const T* rhs, T* out, int* info, int64_t batch, int r, int k, void* stream);
const char* singular_values_cuda(const double* matrices, double* values, int* info, int64_t batch, int n,
                                 void* stream);
// The largest orders that fit the shared memory of the current device, 0 if there is none.
int eigh_cuda_limit(int element_size);
int cholesky_cuda_limit(int element_size);   // cholesky and cholesky_substitute
int sylvester_cuda_limit(int element_size);  // sylvester_rotate, of r and k
int singular_values_cuda_limit(int element_size);
#endif

}  // namespace lora_kernels
