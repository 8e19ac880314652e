// The CUDA kernels of small matrices on good and bad input: `main ORDER BAD TRACE` prints their residuals, and with
// TRACE the wavefronts of eigh's shared-memory accesses over the least possible.
#include <cstdio>
#include <cstdlib>
#include <random>

#include "cuda_runtime.h"
#include "linalg.h"

using namespace lora_kernels;

template <class T>
struct Case {
  explicit Case(int order, bool bad) : n(order), a(n * n), values(n), vectors(n * n), info(1) {
    std::mt19937 bits(1);
    std::normal_distribution<T> normal;
    std::vector<T> root(n * n);
    for (T& x : root) x = normal(bits);
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < n; ++j) {
        T sum = i == j ? T(0.1) : T(0);
        for (int k = 0; k < n; ++k) sum += root[i * n + k] * root[j * n + k];
        a[i * n + j] = sum;
      }
    if (bad) a[n / 2 * n + n / 3] = NAN;
    rhs = root;
  }

  void eigh() {
    eigh_cuda<T>(a.data(), values.data(), vectors.data(), info.data(), 1, n, nullptr);
    T worst = 0;
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < n; ++j) {
        T sum = -vectors[i * n + j] * values[j];
        for (int k = 0; k < n; ++k) sum += a[i >= k ? i * n + k : k * n + i] * vectors[k * n + j];
        worst = fmax(worst, fabs(sum));
      }
    std::printf("eigh info %d residual %.1e\n", info[0], double(worst / fabs(values[n - 1])));
  }

  void solve(bool bad) {
    std::vector<T> factor(n * n), x(n * n);
    cholesky_cuda<T>(a.data(), factor.data(), info.data(), 1, n, nullptr);
    const int status = info[0];
    T worst = 0;
    if (!bad) {
      cholesky_substitute_cuda<T>(factor.data(), rhs.data(), x.data(), 1, n, n, nullptr);
      for (int i = 0; i < n; ++i)
        for (int j = 0; j < n; ++j) {
          T sum = -rhs[i * n + j];
          for (int k = 0; k < n; ++k) sum += a[i * n + k] * x[k * n + j];
          worst = fmax(worst, fabs(sum));
        }
    }
    std::printf("cholesky info %d residual %.1e\n", status, double(worst));
  }

  void sylvester() {
    std::vector<T> x(n * n);
    sylvester_rotate_cuda<T>(values.data(), vectors.data(), values.data(), vectors.data(), rhs.data(), x.data(),
                             info.data(), 1, n, n, nullptr);
    T worst = 0;
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < n; ++j) {
        T sum = -rhs[i * n + j];
        for (int k = 0; k < n; ++k) sum += a[i * n + k] * x[k * n + j] + x[i * n + k] * a[k * n + j];
        worst = fmax(worst, fabs(sum));
      }
    std::printf("sylvester info %d residual %.1e\n", info[0], double(worst));
  }

  int n;
  std::vector<T> a, values, vectors, rhs;
  std::vector<int> info;
};

int main(int, char** arguments) {
  const int n = std::atoi(arguments[1]);
  const bool bad = std::atoi(arguments[2]);
  if (std::atoi(arguments[3])) {
    shim::tracing = true;
    Case<float>(n, bad).eigh();
    std::printf("float wavefronts %.3f\n", double(shim::wavefronts) / double(shim::ideal));
    shim::wavefronts = shim::ideal = 0;
    Case<double>(n, bad).eigh();
    std::printf("double wavefronts %.3f\n", double(shim::wavefronts) / double(shim::ideal));
    return 0;
  }
  Case<double> problem(n, bad);
  problem.eigh();
  if (!bad) problem.sylvester();
  problem.solve(bad);
  singular_values_cuda(problem.a.data(), problem.values.data(), problem.info.data(), 1, n, nullptr);
  std::printf("singular_values info %d first %.6e\n", problem.info[0], problem.values[0]);
}
