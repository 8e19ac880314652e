// The module lora_kernels._C. Tensors arrive as addresses; the Python side has checked shapes, dtypes and devices.
#include <pybind11/pybind11.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <stdexcept>
#include <string>

#include "drivers.h"

namespace py = pybind11;
namespace lk = lora_kernels;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(bool good, const char* message) {
  if (!good) throw py::value_error(message);
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

void bind_linalg(py::module_& m);  // linalg_bindings.cpp

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of lora_kernels";
  m.def("build_info", &build_info);
  m.def("pack_rows", &pack_rows);
  m.def("random_matrix", &random_matrix);
  bind_linalg(m);
}
