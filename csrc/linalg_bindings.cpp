// Bindings of the small dense algebra. As in bindings.cpp, tensors arrive as addresses that Python has checked.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "lanes.h"
#include "linalg.h"

namespace py = pybind11;
namespace lk = lora_kernels;

namespace {

using Address = uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(bool good) {
  if (!good) throw py::value_error("sizes and threads must not be negative");
}

// Runs a driver without the interpreter lock. Returns (status, index); Python puts them into words.
template <class Driver>
py::tuple run(const Driver& driver) {
  lk::Outcome outcome{};
  {
    py::gil_scoped_release release;
    outcome = driver();
  }
  return py::make_tuple(outcome.status, outcome.index);
}

template <typename T>
py::tuple eigh(Address matrices, Address values, Address vectors, int64_t batch, int n, int threads) {
  check(batch >= 0 && n >= 0 && threads >= 1);
  return run([&] { return lk::eigh_cpu(at<const T>(matrices), at<T>(values), at<T>(vectors), batch, n, threads); });
}

template <typename T>
py::tuple cholesky(Address matrices, Address factors, int64_t batch, int n, int threads) {
  check(batch >= 0 && n >= 0 && threads >= 1);
  return run([&] { return lk::cholesky_cpu(at<const T>(matrices), at<T>(factors), batch, n, threads); });
}

template <typename T>
py::tuple cholesky_solve(Address matrices, Address rhs, Address out, int64_t batch, int n, int64_t columns, int threads) {
  check(batch >= 0 && n >= 0 && columns >= 0 && threads >= 1);
  return run([&] {
    return lk::cholesky_solve_cpu(at<const T>(matrices), at<const T>(rhs), at<T>(out), batch, n, columns, threads);
  });
}

template <typename T>
py::tuple sylvester(Address p, Address q, Address rhs, Address out, int64_t batch, int r, int k, int threads) {
  check(batch >= 0 && r >= 0 && k >= 0 && threads >= 1);
  return run([&] {
    return lk::sylvester_cpu(at<const T>(p), at<const T>(q), at<const T>(rhs), at<T>(out), batch, r, k, threads);
  });
}

py::tuple singular_values(Address matrices, Address values, int64_t batch, int n, int threads) {
  check(batch >= 0 && n >= 0 && threads >= 1);
  return run([&] { return lk::singular_values_cpu(at<const double>(matrices), at<double>(values), batch, n, threads); });
}

#ifdef LK_WITH_CUDA
void launched(const char* error) {
  if (error) throw std::runtime_error(std::string("CUDA: ") + error);
}

template <typename T>
void eigh_cuda(Address matrices, Address values, Address vectors, Address info, int64_t batch, int n, Address stream) {
  launched(lk::eigh_cuda(at<const T>(matrices), at<T>(values), at<T>(vectors), at<int>(info), batch, n,
                         at<void>(stream)));
}

template <typename T>
void cholesky_cuda(Address matrices, Address factors, Address info, int64_t batch, int n, Address stream) {
  launched(lk::cholesky_cuda(at<const T>(matrices), at<T>(factors), at<int>(info), batch, n, at<void>(stream)));
}

template <typename T>
void cholesky_substitute_cuda(Address factors, Address rhs, Address out, int64_t batch, int n, int64_t columns,
                              Address stream) {
  launched(lk::cholesky_substitute_cuda(at<const T>(factors), at<const T>(rhs), at<T>(out), batch, n, columns,
                                        at<void>(stream)));
}

template <typename T>
void sylvester_rotate_cuda(Address p_values, Address p_vectors, Address q_values, Address q_vectors, Address rhs,
                           Address out, Address info, int64_t batch, int r, int k, Address stream) {
  launched(lk::sylvester_rotate_cuda(at<const T>(p_values), at<const T>(p_vectors), at<const T>(q_values),
                                     at<const T>(q_vectors), at<const T>(rhs), at<T>(out), at<int>(info), batch, r, k,
                                     at<void>(stream)));
}

void singular_values_cuda(Address matrices, Address values, Address info, int64_t batch, int n, Address stream) {
  launched(lk::singular_values_cuda(at<const double>(matrices), at<double>(values), at<int>(info), batch, n,
                                    at<void>(stream)));
}
#endif

}  // namespace

// One name per dtype: eigh_float32, eigh_float64.
#define LK_BIND(NAME)                   \
  m.def(#NAME "_float32", &NAME<float>); \
  m.def(#NAME "_float64", &NAME<double>);

void bind_linalg(py::module_& m) {
  m.def("lane_bytes", &lk::lane_bytes);
  LK_BIND(eigh)
  LK_BIND(cholesky)
  LK_BIND(cholesky_solve)
  LK_BIND(sylvester)
  m.def("singular_values_float64", &singular_values);
#ifdef LK_WITH_CUDA
  LK_BIND(eigh_cuda)
  LK_BIND(cholesky_cuda)
  LK_BIND(cholesky_substitute_cuda)
  LK_BIND(sylvester_rotate_cuda)
  m.def("singular_values_cuda_float64", &singular_values_cuda);
  m.def("eigh_cuda_limit", &lk::eigh_cuda_limit);
  m.def("cholesky_cuda_limit", &lk::cholesky_cuda_limit);
  m.def("sylvester_cuda_limit", &lk::sylvester_cuda_limit);
  m.def("singular_values_cuda_limit", &lk::singular_values_cuda_limit);
#endif
}
