// The module lora_kernels._C. Tensors arrive as addresses; the Python side has checked shapes, dtypes and devices.
#include <pybind11/pybind11.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <stdexcept>
#include <string>

#include "drivers.h"
#include "small_linalg.h"

namespace py = pybind11;
namespace lk = lora_kernels;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void raise(const lk::Outcome& outcome) {
  const std::string where = "matrix " + std::to_string(outcome.index);
  if (outcome.status == lk::kNotFinite) throw py::value_error(where + " holds NaN or infinite entries");
  if (outcome.status == lk::kNotConverged) throw std::runtime_error("the Jacobi iteration did not converge for " + where);
}

void check(bool good, const char* message) {
  if (!good) throw py::value_error(message);
}

void eigh(uintptr_t matrices, uintptr_t values, uintptr_t vectors, int64_t batch, int n, bool wide, int threads) {
  check(batch >= 0 && n >= 0 && threads >= 1, "batch, n and threads must not be negative");
  lk::Outcome outcome{};
  {
    py::gil_scoped_release release;
    outcome = wide ? lk::eigh_cpu(pointer<const double>(matrices), pointer<double>(values), pointer<double>(vectors),
                                  batch, n, threads)
                   : lk::eigh_cpu(pointer<const float>(matrices), pointer<float>(values), pointer<float>(vectors),
                                  batch, n, threads);
  }
  raise(outcome);
}

void pack_rows(uintptr_t x, int dtype, int64_t row_stride, uintptr_t index, int64_t rows, int64_t columns,
               uintptr_t weight, uintptr_t panel, uintptr_t weighted, uintptr_t column_sum, uintptr_t square_weight,
               uintptr_t square_sum, int threads) {
  check(dtype >= 0 && dtype <= 2, "dtype must be 0 (float32), 1 (float16) or 2 (bfloat16)");
  check(rows >= 0 && columns >= 0 && threads >= 1, "rows, columns and threads must not be negative");
  const lk::PackRows job{pointer<const void>(x), dtype, row_stride, pointer<const int64_t>(index), rows, columns,
                         pointer<const float>(weight), pointer<float>(panel), pointer<float>(weighted),
                         pointer<float>(column_sum), pointer<const float>(square_weight), pointer<float>(square_sum)};
  py::gil_scoped_release release;
  lk::pack_rows(job, threads);
}

void random_matrix(uintptr_t out, int64_t rows, int64_t columns, bool gaussian, int64_t seed, uint32_t stream,
                   uint32_t step, int threads) {
  check(rows >= 0 && columns >= 0 && threads >= 1, "rows, columns and threads must not be negative");
  if (rows == 0 || columns == 0) return;
  const lk::RandomMatrix job{pointer<float>(out), rows, columns, gaussian, uint64_t(seed), stream, step};
  py::gil_scoped_release release;
  lk::random_matrix(job, threads);
}

#ifdef LK_WITH_CUDA
void eigh_cuda(uintptr_t matrices, uintptr_t values, uintptr_t vectors, uintptr_t info, int64_t batch, int n, bool wide,
               uintptr_t stream) {
  const char* error =
      wide ? lk::eigh_cuda(pointer<const double>(matrices), pointer<double>(values), pointer<double>(vectors),
                           pointer<int>(info), batch, n, pointer<void>(stream))
           : lk::eigh_cuda(pointer<const float>(matrices), pointer<float>(values), pointer<float>(vectors),
                           pointer<int>(info), batch, n, pointer<void>(stream));
  if (error) throw std::runtime_error(std::string("CUDA: ") + error);
}
#endif

py::dict build_info() {
  py::dict info;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#ifdef LK_WITH_CUDA
  info["cuda"] = true;
  info["cuda_archs"] = LK_CUDA_ARCHS;
#else
  info["cuda"] = false;
  info["cuda_archs"] = "";
#endif
  info["compiler"] = LK_COMPILER;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of lora_kernels";
  m.def("build_info", &build_info);
  m.def("eigh", &eigh);
  m.def("pack_rows", &pack_rows);
  m.def("random_matrix", &random_matrix);
#ifdef LK_WITH_CUDA
  m.def("eigh_cuda", &eigh_cuda);
  m.def("eigh_cuda_limit", &lk::eigh_cuda_limit);
#endif
}
