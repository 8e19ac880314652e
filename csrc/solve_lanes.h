// Cholesky factors and singular values on the CPU, one matrix per vector lane.
#pragma once

#include "lanes.h"

namespace lora_kernels {

// The lower triangle of a (row-major) becomes its Cholesky factor; inverse[j] = 1 / L_jj (left-looking, Golub and Van
// Loan section 4.2). Returns per lane the order of the first leading minor that is not positive, or 0.
template <class L>
LK_HD typename L::Mask cholesky_lanes(typename L::V* a, typename L::V* inverse, int n) {
  using V = typename L::V;
  typename L::Mask minor{};
  for (int j = 0; j < n; ++j) {
    const V* const pivot = a + j * n;
    V square = pivot[j];
    for (int k = 0; k < j; ++k) square -= pivot[k] * pivot[k];
    const auto positive = square > 0;
    minor = (positive | (minor != 0)) ? minor : minor + (j + 1);
    const V root = L::root(positive ? square : splat<L>(1));
    a[j * n + j] = root;
    inverse[j] = 1 / root;
    for (int i = j + 1; i < n; i += 4) {
      // Four rows at a time for independent sums; rows past the end repeat the last one, to the same value.
      V* const r0 = a + i * n;
      V* const r1 = i + 1 < n ? r0 + n : r0;
      V* const r2 = i + 2 < n ? r1 + n : r1;
      V* const r3 = i + 3 < n ? r2 + n : r2;
      V s0 = r0[j], s1 = r1[j], s2 = r2[j], s3 = r3[j];
      for (int k = 0; k < j; ++k) {
        s0 -= r0[k] * pivot[k];
        s1 -= r1[k] * pivot[k];
        s2 -= r2[k] * pivot[k];
        s3 -= r3[k] * pivot[k];
      }
      r0[j] = s0 * inverse[j];
      r1[j] = s1 * inverse[j];
      r2[j] = s2 * inverse[j];
      r3[j] = s3 * inverse[j];
    }
  }
  return minor;
}

// Singular values of a (n * n, destroyed) into `values`, unsorted, by one-sided Jacobi on its rows (Golub and Van Loan
// section 8.6.3; Demmel and Veselic 1992 for its accuracy). squares: n vectors of scratch.
// Returns the lanes that have not converged.
template <class L>
LK_HD typename L::Mask singular_values_lanes(typename L::V* a, typename L::V* squares, typename L::V* values, int n) {
  using V = typename L::V;
  using Mask = typename L::Mask;
  constexpr double epsilon = Limits<double>::epsilon;
  Mask turned{};
  for (int sweep = 0; sweep <= kMaxSweeps; ++sweep) {
    // Rotations update the squares; every sweep begins with exact ones.
    V total = V{};
    for (int i = 0; i < n; ++i) {
      squares[i] = V{};
      for (int k = 0; k < n; ++k) squares[i] += a[i * n + k] * a[i * n + k];
      total += squares[i];
    }
    const V noise = null_square(total, epsilon);
    turned = Mask{};
    for (int p = 0; p < n - 1; ++p) {
      for (int q = p + 1; q < n; ++q) {
        V *const x = a + p * n, *const y = a + q * n;
        V s0 = V{}, s1 = V{}, s2 = V{}, s3 = V{};
        int k = 0;
        for (; k + 3 < n; k += 4) {
          s0 += x[k] * y[k];
          s1 += x[k + 1] * y[k + 1];
          s2 += x[k + 2] * y[k + 2];
          s3 += x[k + 3] * y[k + 3];
        }
        for (; k < n; ++k) s0 += x[k] * y[k];
        const V xx = squares[p], yy = squares[q], xy = (s0 + s1) + (s2 + s3);
        const Mask skip = orthogonal(xx, yy, xy, noise, epsilon, n);
        if (!any<L>(~skip)) continue;
        turned |= ~skip;
        const Rotation<L> turn = jacobi_rotation<L>(xx, yy, xy, skip);
        squares[p] = xx - turn.t * xy;
        squares[q] = yy + turn.t * xy;
        for (k = 0; k < n; ++k) {
          const V u = x[k], w = y[k];
          x[k] = turn.first(u, w);
          y[k] = turn.second(u, w);
        }
      }
    }
    if (!any<L>(turned)) break;
  }
  for (int i = 0; i < n; ++i) {
    V square = V{};
    for (int k = 0; k < n; ++k) square += a[i * n + k] * a[i * n + k];
    values[i] = L::root(square);
  }
  return turned;
}

}  // namespace lora_kernels
