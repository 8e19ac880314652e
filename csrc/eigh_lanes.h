// Symmetric eigenproblems on the CPU, one matrix per vector lane.
//
// Householder tridiagonalisation, then implicit QL with Wilkinson's shift (Golub and Van Loan, Matrix Computations,
// sections 8.3 and 8.2). Lanes run in lock step: a rotation that a lane has no use for is the identity there. This is
// 3 to 5 times less arithmetic than cyclic Jacobi, which the GPU uses because its rotations are parallel.
#pragma once

#include <algorithm>

#include "lanes.h"

namespace lora_kernels {

constexpr int kMaxShifts = 30;  // per eigenvalue, on average over the matrix

// A sum of squares below this is rounding noise of a matrix of entries up to 2: it cannot be normalised accurately.
constexpr double kNoiseSquare = 1e-280;
constexpr double kEpsilon = Limits<double>::epsilon;
constexpr double kSignTie = 0.999;     // entries this close in magnitude count as equal, since rounding decides
constexpr int kLeastExponent = -1021;  // of a power of two with a finite inverse

// Reduces `a` (lower triangle, row-major) to diagonal d and subdiagonal e; the reflectors stay below the diagonal of a,
// their factors in tau. x, p: n vectors of scratch each.
template <class L>
LK_HD void tridiagonalize(typename L::V* a, typename L::V* d, typename L::V* e, typename L::V* tau, typename L::V* x,
                          typename L::V* p, int n) {
  using V = typename L::V;
  for (int k = 0; k + 1 < n; ++k) {
    const int m = n - k - 1;  // order of what remains
    V* const rest = a + (k + 1) * n + k + 1;
    V square = V{};
    for (int i = 0; i < m; ++i) {
      x[i] = a[(k + 1 + i) * n + k];
      if (i > 0) square += x[i] * x[i];
    }
    const V head = x[0], norm2 = square + head * head;
    d[k] = a[k * n + k];
    const auto reflect = (square > 0) & (norm2 > splat<L>(kNoiseSquare));
    const V norm = L::root(norm2);
    const V beta = head > 0 ? -norm : norm;
    const V inverse = 1 / (reflect ? head - beta : splat<L>(1));
    const V factor = reflect ? (beta - head) / (reflect ? beta : splat<L>(1)) : V{};
    e[k] = reflect ? beta : head;
    tau[k] = factor;
    x[0] = splat<L>(1);
    for (int i = 1; i < m; ++i) x[i] = reflect ? x[i] * inverse : V{};
    for (int i = 0; i < m; ++i) {
      a[(k + 1 + i) * n + k] = x[i];
      p[i] = V{};
    }
    for (int i = 0; i < m; ++i) {
      const V* const row = rest + i * n;
      V sum = row[i] * x[i];
      for (int j = 0; j < i; ++j) {
        sum += row[j] * x[j];
        p[j] += row[j] * x[i];
      }
      p[i] += sum;
    }
    V dot = V{};
    for (int i = 0; i < m; ++i) {
      p[i] *= factor;
      dot += p[i] * x[i];
    }
    const V half = dot * factor * 0.5;
    for (int i = 0; i < m; ++i) p[i] -= half * x[i];
    for (int i = 0; i < m; ++i) {
      V* const row = rest + i * n;
      const V xi = x[i], pi = p[i];
      for (int j = 0; j <= i; ++j) row[j] -= xi * p[j] + pi * x[j];
    }
  }
  d[n - 1] = a[n * n - 1];
  e[n - 1] = V{};
}

// The product of the reflectors, transposed: row i of v is column i of Q.
template <class L>
LK_HD void accumulate_reflectors(const typename L::V* a, const typename L::V* tau, typename L::V* x, typename L::V* v,
                                 int n) {
  using V = typename L::V;
  for (int i = 0; i < n * n; ++i) v[i] = V{};
  for (int i = 0; i < n; ++i) v[i * n + i] = splat<L>(1);
  for (int k = n - 2; k >= 0; --k) {
    for (int i = k + 1; i < n; ++i) x[i] = a[i * n + k];
    int row = k + 1;
    for (; row + 3 < n; row += 4) {
      V* const r0 = v + row * n;
      V *const r1 = r0 + n, *const r2 = r1 + n, *const r3 = r2 + n;
      V s0 = V{}, s1 = V{}, s2 = V{}, s3 = V{};
      for (int i = k + 1; i < n; ++i) {
        s0 += r0[i] * x[i];
        s1 += r1[i] * x[i];
        s2 += r2[i] * x[i];
        s3 += r3[i] * x[i];
      }
      s0 *= tau[k];
      s1 *= tau[k];
      s2 *= tau[k];
      s3 *= tau[k];
      for (int i = k + 1; i < n; ++i) {
        r0[i] -= s0 * x[i];
        r1[i] -= s1 * x[i];
        r2[i] -= s2 * x[i];
        r3[i] -= s3 * x[i];
      }
    }
    for (; row < n; ++row) {
      V* const r = v + row * n;
      V s = V{};
      for (int i = k + 1; i < n; ++i) s += r[i] * x[i];
      s *= tau[k];
      for (int i = k + 1; i < n; ++i) r[i] -= s * x[i];
    }
  }
}

// Implicit QL on (d, e). The rows of v take the rotations. active: n + 1 masks of scratch.
// Returns the lanes that have not converged.
template <class L>
LK_HD typename L::Mask implicit_ql(typename L::V* d, typename L::V* e, typename L::V* v, typename L::Mask* active,
                                   int n) {
  using V = typename L::V;
  using Mask = typename L::Mask;
  const V one = splat<L>(1);
  V norm = V{};
  for (int i = 0; i < n; ++i) norm = larger<L>(norm, larger<L>(magnitude<L>(d[i]), magnitude<L>(e[i])));
  const V floor = norm * (kEpsilon * kEpsilon);
  int low = 0;
  Mask seen{};
  for (int shifts = 0; shifts <= kMaxShifts * n; ++shifts) {
    // Each lane works on its first block: the first run of subdiagonal entries that are not negligible.
    seen = Mask{};
    Mask run{}, end{};
    V dl = V{}, dn = V{}, el = one;
    for (int i = low; i + 1 < n; ++i) {
      const V size = magnitude<L>(e[i]);
      const Mask wanted = (size > kEpsilon * (magnitude<L>(d[i]) + magnitude<L>(d[i + 1]))) & (size > floor);
      e[i] = wanted ? e[i] : V{};
      const Mask first = wanted & ~seen;
      run = wanted & (run | ~seen);
      seen |= wanted;
      active[i] = run;
      end = run ? Mask{} + (i + 1) : end;
      dl = first ? d[i] : dl;
      dn = first ? d[i + 1] : dn;
      el = first ? e[i] : el;
    }
    if (!any<L>(seen)) return seen;
    while (low + 1 < n && !any<L>(active[low])) ++low;
    const int top = highest<L>(end);
    active[top] = Mask{};
    const V slope = (dn - dl) / (2 * el);
    const V root = L::root(slope * slope + 1);
    const V shift = el / (slope + (slope < 0 ? -root : root)) - dl;
    V c = one, s = one, p = V{}, g = V{};
    for (int i = top - 1; i >= low; --i) {
      const Mask on = active[i], start = on & ~active[i + 1];
      g = start ? d[i + 1] + shift : g;
      c = start ? one : c;
      s = start ? one : s;
      p = start ? V{} : p;
      const V f = s * e[i], b = c * e[i];
      const V square = f * f + g * g;
      const Mask noise = square < splat<L>(kNoiseSquare);
      const V r = L::root(square), inverse = 1 / r;
      e[i + 1] = on ? (start ? V{} : noise ? g : r) : e[i + 1];
      s = noise ? V{} : f * inverse;
      c = noise ? one : g * inverse;
      const V base = d[i + 1] - p;
      const V t = (d[i] - base) * s + 2 * c * b;
      p = s * t;
      g = c * t - b;
      d[i + 1] = on ? base + p : d[i + 1];
      const Mask last = on & ~(i > low ? active[i - 1] : Mask{});
      d[i] = last ? d[i] - p : d[i];
      e[i] = last ? g : e[i];
      const V cc = on ? c : one, ss = on ? s : V{};
      V* const lower = v + i * n;
      V* const upper = lower + n;
      for (int k = 0; k < n; ++k) {
        const V x = lower[k], y = upper[k];
        upper[k] = ss * x + cc * y;
        lower[k] = cc * x - ss * y;
      }
    }
  }
  return seen;
}

// Loads lower triangles, each scaled by a power of two to entries below 2, so that squares neither overflow nor vanish.
// Lanes that hold NaN or infinite entries become zero. Returns the finite ones.
template <class L, typename T>
LK_HD typename L::Mask load_symmetric(const T* matrices, int count, int n, typename L::V* a, typename L::V& scale) {
  using V = typename L::V;
  const Sources<L, T> sources(matrices, int64_t(n) * n, count);
  V largest = V{}, poison = V{};
  for (int i = 0; i < n; ++i)
    for (int j = 0; j <= i; ++j) {
      const V x = sources[i * n + j];
      a[i * n + j] = x;
      largest = larger<L>(largest, magnitude<L>(x));
      poison += x - x;
    }
  const auto finite = poison == 0;
  V shrink;
  for (int l = 0; l < L::count; ++l) {
    int exponent = 0;
    if (finite[l]) std::frexp(largest[l], &exponent);
    exponent = std::max(exponent - 1, kLeastExponent);
    scale[l] = std::ldexp(1.0, exponent);
    shrink[l] = std::ldexp(1.0, -exponent);
  }
  for (int i = 0; i < n; ++i)
    for (int j = 0; j <= i; ++j) a[i * n + j] = finite ? a[i * n + j] * shrink : V{};
  return finite;
}

// rank[i]: the place of d[i] in ascending order, the first of equals first.
template <class L>
LK_HD void ascending_ranks(const typename L::V* d, typename L::Mask* rank, int n) {
  for (int i = 0; i < n; ++i) rank[i] = typename L::Mask{};
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < i; ++j) {
      const auto before = d[i] < d[j];  // -1 where true
      rank[j] -= before;
      rank[i] += 1 + before;
    }
}

// The sign rule of reference.py: makes the first entry of each row that comes near its largest magnitude positive.
template <class L>
LK_HD void fix_signs(typename L::V* v, int n) {
  using V = typename L::V;
  for (int i = 0; i < n; ++i) {
    V* const row = v + i * n;
    V largest = magnitude<L>(row[0]), leader = V{};
    for (int k = 1; k < n; ++k) largest = larger<L>(largest, magnitude<L>(row[k]));
    const V near = kSignTie * largest;
    for (int k = n - 1; k >= 0; --k) leader = magnitude<L>(row[k]) >= near ? row[k] : leader;
    for (int k = 0; k < n; ++k) row[k] = leader < 0 ? -row[k] : row[k];
  }
}

// All of the above: lower triangles a (n * n, destroyed) to unsorted eigenvalues d (n) and eigenvectors as rows of v
// (n * n). scratch: eigh_scratch(n) vectors. Returns the lanes that have not converged.
LK_HD int64_t eigh_scratch(int64_t n) { return 5 * n + 1; }
template <class L>
LK_HD typename L::Mask eigh_lanes(typename L::V* a, typename L::V* d, typename L::V* v, typename L::V* scratch, int n) {
  using V = typename L::V;
  V *const e = scratch, *const tau = e + n, *const x = tau + n, *const p = x + n;
  tridiagonalize<L>(a, d, e, tau, x, p, n);
  accumulate_reflectors<L>(a, tau, x, v, n);
  return implicit_ql<L>(d, e, v, reinterpret_cast<typename L::Mask*>(p + n), n);
}

}  // namespace lora_kernels
