// The module lora_kernels._C. Tensors arrive as addresses; the Python side has checked shapes, dtypes and devices.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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

lk::Dropout make_dropout(int64_t threshold, uint64_t seed, uint32_t stream) {
  check(threshold >= 0 && threshold <= 65535, "threshold must lie in [0, 65535]");
  return {int(threshold), seed, stream};
}

void check_lora(int64_t tokens, int64_t columns, int64_t rank, int threads) {
  check(tokens >= 0 && columns >= 0 && rank >= 0 && threads >= 1, "sizes and threads must not be negative");
  check(tokens <= int64_t(1) << 32 && columns <= int64_t(1) << 35, "sizes must fit the counters of the generator");
}

template <bool BFLOAT16>
void lora_shrink(uintptr_t x, int64_t x_stride, uintptr_t a, int64_t a_stride, uintptr_t t, int64_t t_stride,
                 int64_t tokens, int64_t columns, int64_t rank, float scale, int64_t threshold, uint64_t seed,
                 uint32_t stream, int threads) {
  check_lora(tokens, columns, rank, threads);
  const lk::LoraShrink job{pointer<const void>(x), BFLOAT16, x_stride, pointer<const float>(a), a_stride,
                           pointer<float>(t), t_stride, tokens, columns, rank, scale,
                           make_dropout(threshold, seed, stream)};
  py::gil_scoped_release release;
  lk::lora_shrink(job, threads);
}

template <bool BFLOAT16>
void lora_tsreduce(uintptr_t t, int64_t t_stride, uintptr_t z, int64_t z_stride, uintptr_t out, int64_t out_stride,
                   int64_t tokens, int64_t columns, int64_t rank, int64_t threshold, uint64_t seed, uint32_t stream,
                   int threads) {
  check_lora(tokens, columns, rank, threads);
  const lk::LoraReduce job{pointer<const float>(t), t_stride, pointer<const void>(z), BFLOAT16, z_stride,
                           pointer<float>(out), out_stride, tokens, columns, rank,
                           make_dropout(threshold, seed, stream)};
  py::gil_scoped_release release;
  lk::lora_tsreduce(job, threads);
}

template <bool BFLOAT16>
void lora_expand(uintptr_t t, int64_t t_stride, uintptr_t b, int64_t b_stride, uintptr_t y, int64_t y_stride,
                 int64_t tokens, int64_t columns, int64_t rank, bool accumulate, uintptr_t bias, int64_t threshold,
                 uint64_t seed, uint32_t stream, int threads) {
  check_lora(tokens, columns, rank, threads);
  check(!(accumulate && bias), "a bias cannot be given where y accumulates");
  const lk::LoraExpand job{pointer<const float>(t), t_stride, pointer<const float>(b), b_stride, pointer<void>(y),
                           BFLOAT16, y_stride, tokens, columns, rank, accumulate, pointer<const float>(bias),
                           make_dropout(threshold, seed, stream)};
  py::gil_scoped_release release;
  lk::lora_expand(job, threads);
}

void dora_sum(bool bfloat16, uintptr_t w, int64_t w_stride, uintptr_t a, uintptr_t b, uintptr_t out, int64_t rows,
              int64_t columns, int64_t rank, int threads) {
  check_lora(rows, columns, rank, threads);
  const lk::DoraSum job{pointer<const void>(w), bfloat16, w_stride, pointer<const float>(a), pointer<const float>(b),
                        pointer<float>(out), rows, columns, rank};
  py::gil_scoped_release release;
  lk::dora_sum(job, threads);
}

void rescaled_backward(bool bfloat16, uintptr_t product, uintptr_t g, int64_t g_stride, uintptr_t scale,
                       uintptr_t inner, uintptr_t d_product, uintptr_t out, int64_t rows, int64_t columns,
                       int threads) {
  check_lora(rows, columns, 0, threads);
  const lk::RescaledBackward job{pointer<const void>(product), pointer<const void>(g), bfloat16, g_stride,
                                 pointer<const float>(scale), pointer<const float>(inner), pointer<void>(d_product),
                                 pointer<float>(out), rows, columns};
  py::gil_scoped_release release;
  lk::rescaled_backward(job, threads);
}

// The two calls of a layer take plain numbers by Python's vectorcall: a call is as cheap as the numbers in it, where
// pybind11 would take longer than the products of a small layer.
struct Numbers {
  PyObject* const* items;
  Py_ssize_t at = 0;

  int64_t integer() {
    const long long value = PyLong_AsLongLong(items[at++]);
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  uint64_t bits() {
    const unsigned long long value = PyLong_AsUnsignedLongLong(items[at++]);
    if (value == ~0ull && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  float real() {
    const double value = PyFloat_AsDouble(items[at++]);
    if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    return float(value);
  }
  template <typename T>
  T* address() {
    return pointer<T>(uintptr_t(bits()));
  }
};

constexpr Py_ssize_t kLayerNumbers = 16;

// flags: 1 where x, 2 where a and b, 4 where a0 and b0 are bfloat16; then sizes, factors, scales, dropout, threads.
lk::LoraLayer read_layer(Numbers& next, int& threads) {
  const int64_t flags = next.integer();
  const int64_t tokens = next.integer(), inputs = next.integer(), outputs = next.integer(), rank = next.integer(),
                frozen_rank = next.integer();
  const auto a = next.address<const void>(), b = next.address<const void>(), a0 = next.address<const void>(),
             b0 = next.address<const void>();
  const float scale = next.real(), frozen_scale = next.real();
  const int64_t threshold = next.integer();
  const uint64_t seed = next.bits();
  const int64_t stream = next.integer();
  threads = int(next.integer());
  check_lora(tokens, inputs, rank, threads);
  check_lora(tokens, outputs, frozen_rank, threads);
  check((a || rank * inputs == 0) && (b || rank * outputs == 0), "the factors have no memory");
  check((a0 || frozen_rank * inputs == 0) && (b0 || frozen_rank * outputs == 0), "the frozen factors have no memory");
  return {bool(flags & 1), bool(flags & 2), bool(flags & 4), tokens, inputs, outputs, rank, frozen_rank, a, b, a0, b0,
          scale, frozen_scale, make_dropout(threshold, seed, uint32_t(stream))};
}

template <class Run>
PyObject* guarded(Py_ssize_t given, Py_ssize_t expected, const Run& run) {
  try {
    check(given == expected, "wrong number of arguments");
    run();
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  } catch (const std::exception& error) {
    PyErr_SetString(dynamic_cast<const py::value_error*>(&error) ? PyExc_ValueError : PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

// The layer's numbers, then x, its row stride, t, y.
PyObject* lora_forward(PyObject*, PyObject* const* items, Py_ssize_t count) {
  return guarded(count, kLayerNumbers + 4, [&] {
    Numbers next{items};
    int threads;
    lk::LoraForward job{read_layer(next, threads)};
    job.x = next.address<const void>();
    job.x_stride = next.integer();
    job.t = next.address<float>();
    job.y = next.address<void>();
    py::gil_scoped_release release;
    lk::lora_forward(job, threads);
  });
}

// The layer's numbers, then g, its row stride, x, its row stride, t, dx, whether dx accumulates, da, db.
PyObject* lora_backward(PyObject*, PyObject* const* items, Py_ssize_t count) {
  return guarded(count, kLayerNumbers + 9, [&] {
    Numbers next{items};
    int threads;
    lk::LoraBackward job{read_layer(next, threads)};
    job.g = next.address<const void>();
    job.g_stride = next.integer();
    job.x = next.address<const void>();
    job.x_stride = next.integer();
    job.t = next.address<const float>();
    job.dx = next.address<void>();
    job.accumulate = next.integer() != 0;
    job.da = next.address<float>();
    job.db = next.address<float>();
    check(job.layer.tokens == 0 || (!(job.da && !job.x) && !(job.db && !job.t)), "da needs x, and db needs t");
    py::gil_scoped_release release;
    lk::lora_backward(job, threads);
  });
}

// Addresses of x (and g) come with a row stride; offsets are int64, from 0 on, not decreasing and at most `rows`.
lk::GroupedLora grouped_layer(bool bfloat16, uintptr_t offsets, int64_t experts, int64_t rows, int64_t inputs,
                              int64_t outputs, int64_t rank, uintptr_t a, uintptr_t b, float scale, int64_t threshold,
                              uint64_t seed, uint32_t stream, int threads) {
  check_lora(rows, inputs, rank, threads);
  check_lora(rows, outputs, rank, threads);
  check(experts >= 0 && offsets, "experts must not be negative, and offsets must be given");
  const auto* const begins = pointer<const int64_t>(offsets);
  check(begins[0] == 0 && begins[experts] <= rows, "offsets must lie in [0, rows]");
  for (int64_t e = 0; e < experts; ++e) check(begins[e] <= begins[e + 1], "offsets must not decrease");
  return {bfloat16, begins, experts, rows, inputs, outputs, rank, pointer<const float>(a), pointer<const float>(b),
          scale, make_dropout(threshold, seed, stream)};
}

void grouped_lora_forward(bool bfloat16, uintptr_t offsets, int64_t experts, int64_t rows, int64_t inputs,
                          int64_t outputs, int64_t rank, uintptr_t a, uintptr_t b, float scale, int64_t threshold,
                          uint64_t seed, uint32_t stream, int threads, uintptr_t x, int64_t x_stride, uintptr_t t,
                          uintptr_t y) {
  const lk::GroupedForward job{grouped_layer(bfloat16, offsets, experts, rows, inputs, outputs, rank, a, b, scale,
                                             threshold, seed, stream, threads),
                               pointer<const void>(x), x_stride, pointer<float>(t), pointer<void>(y)};
  py::gil_scoped_release release;
  lk::grouped_lora_forward(job, threads);
}

void grouped_lora_backward(bool bfloat16, uintptr_t offsets, int64_t experts, int64_t rows, int64_t inputs,
                           int64_t outputs, int64_t rank, uintptr_t a, uintptr_t b, float scale, int64_t threshold,
                           uint64_t seed, uint32_t stream, int threads, uintptr_t g, int64_t g_stride, uintptr_t x,
                           int64_t x_stride, uintptr_t t, uintptr_t dx, bool accumulate, uintptr_t da, uintptr_t db) {
  const lk::GroupedBackward job{grouped_layer(bfloat16, offsets, experts, rows, inputs, outputs, rank, a, b, scale,
                                              threshold, seed, stream, threads),
                                pointer<const void>(g), g_stride, pointer<const void>(x), x_stride,
                                pointer<const float>(t), pointer<void>(dx), accumulate, pointer<float>(da),
                                pointer<float>(db)};
  check(rows == 0 || (!(da && !x) && !(db && !t)), "da needs x, and db needs t");
  py::gil_scoped_release release;
  lk::grouped_lora_backward(job, threads);
}

// Whether a layer is what it was when it was prepared: dictionaries (cell, key, value) hold their values (or none, where
// the value is None), `empty` are empty, and parts have their classes. Four tuples; `unchanged` of lora_layer.py.
PyObject* unchanged(PyObject*, PyObject* const* items, Py_ssize_t count) {
  bool plain = count == 4;
  for (Py_ssize_t i = 0; plain && i < count; ++i) plain = PyTuple_Check(items[i]);
  if (!plain || PyTuple_GET_SIZE(items[2]) != PyTuple_GET_SIZE(items[3])) {
    PyErr_SetString(PyExc_ValueError, "unchanged takes four tuples, the last two of one length");
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items[0]); ++i) {
    PyObject* const cell = PyTuple_GET_ITEM(items[0], i);
    if (!PyTuple_Check(cell) || PyTuple_GET_SIZE(cell) != 3 || !PyDict_Check(PyTuple_GET_ITEM(cell, 0))) {
      PyErr_SetString(PyExc_TypeError, "unchanged takes tuples of a dictionary, a key and a value");
      return nullptr;
    }
    PyObject* const value = PyDict_GetItemWithError(PyTuple_GET_ITEM(cell, 0), PyTuple_GET_ITEM(cell, 1));
    if (!value && PyErr_Occurred()) return nullptr;
    if ((value ? value : Py_None) != PyTuple_GET_ITEM(cell, 2)) Py_RETURN_FALSE;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items[1]); ++i) {
    const int filled = PyObject_IsTrue(PyTuple_GET_ITEM(items[1], i));
    if (filled < 0) return nullptr;
    if (filled) Py_RETURN_FALSE;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items[2]); ++i) {
    const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(PyTuple_GET_ITEM(items[2], i)));
    if (type != PyTuple_GET_ITEM(items[3], i)) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

PyMethodDef layer_methods[] = {
    {"unchanged", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&unchanged)), METH_FASTCALL,
     "Whether a layer is what it was when it was prepared."},
    {"lora_forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&lora_forward)), METH_FASTCALL,
     "Low-rank part of a LoRA layer, forward: see LoraForward in drivers.h."},
    {"lora_backward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&lora_backward)), METH_FASTCALL,
     "Low-rank part of a LoRA layer, backward: see LoraBackward in drivers.h."},
    {nullptr, nullptr, 0, nullptr},
};

void lora_pro_adam(uintptr_t exp_avg, int64_t avg_stride, uintptr_t exp_avg_sq, int64_t square_stride, int dtype,
                   uintptr_t a, int64_t a_stride, uintptr_t grad_a, int64_t grad_a_stride, uintptr_t b,
                   int64_t b_stride, uintptr_t grad_b, int64_t grad_b_stride, uintptr_t bt_h, uintptr_t h_at,
                   int64_t rows, int64_t columns, int64_t rank, double scale, double beta1, double beta2, double eps,
                   double avg_factor, double root_factor, uint64_t seed, uint32_t step, int64_t row_offset,
                   int64_t batch, const std::array<int64_t, 6>& batch_strides, int64_t row_step, int threads) {
  check(dtype >= 0 && dtype <= 2, "dtype must be 0 (float32), 1 (float64) or 2 (bfloat16)");
  check_lora(rows + row_offset, columns, rank, threads);
  check(rows >= 0 && row_offset >= 0, "rows and row_offset must not be negative");
  check(batch >= 0 && row_step >= 0, "batch and row_step must not be negative");
  const auto& [avg_batch, square_batch, a_batch, grad_a_batch, b_batch, grad_b_batch] = batch_strides;
  const lk::LoraProAdam job{pointer<void>(exp_avg), pointer<void>(exp_avg_sq), dtype, avg_stride, square_stride,
                            pointer<const void>(a), pointer<const void>(grad_a), pointer<const void>(b),
                            pointer<const void>(grad_b), a_stride, grad_a_stride, b_stride, grad_b_stride,
                            pointer<void>(bt_h), pointer<void>(h_at), rows, columns, rank, scale, beta1, beta2, eps,
                            avg_factor, root_factor, seed, step, row_offset, batch, avg_batch, square_batch, a_batch,
                            grad_a_batch, b_batch, grad_b_batch, row_step};
  py::gil_scoped_release release;
  lk::lora_pro_adam(job, threads);
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
  m.def("lora_shrink", &lora_shrink<false>);
  m.def("lora_shrink_bfloat16", &lora_shrink<true>);
  m.def("lora_tsreduce", &lora_tsreduce<false>);
  m.def("lora_tsreduce_bfloat16", &lora_tsreduce<true>);
  m.def("lora_expand", &lora_expand<false>);
  m.def("lora_expand_bfloat16", &lora_expand<true>);
  m.def("grouped_lora_forward", &grouped_lora_forward);
  m.def("grouped_lora_backward", &grouped_lora_backward);
  m.def("dora_sum", &dora_sum);
  m.def("rescaled_backward", &rescaled_backward);
  PyModule_AddFunctions(m.ptr(), layer_methods);
  m.def("lora_pro_adam", &lora_pro_adam);
  bind_linalg(m);
}
