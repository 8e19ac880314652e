"""Random sketches that stand in for sums too large to keep: linear, by matrices drawn by position and never stored."""

from __future__ import annotations

import zlib

import torch

from lora_kernels.linalg.eigen import TopEigenpairs
from lora_kernels.linalg.randomized_svd import RandomizedSVD, probe_bound
from lora_kernels.linalg.single_pass import nystrom, two_sided
from lora_kernels.ops import random_matrix
from lora_kernels.ops.gradient_statistics.op import gradient_statistics_
from lora_kernels.ops.sketch.op import sketch_
from lora_kernels.statistics.sums import GRADIENT, Accumulator, InputSums, OutputGradients, as_rows

KIND = "gaussian"
# Columns drawn like those of the sketch but kept out of the reconstruction: they tell its error (see
# `linalg.probe_bound`).
PROBES = 8


def stream_of(name: str) -> int:
    """The Philox stream of a layer."""
    return zlib.crc32(name.encode())


class InputSketch(InputSums):
    """A sketch of an input's second moment `sum w x (x^T Omega)`, with its first moment and its diagonal.

    Attributes:
        features: n.
        size: k, columns of the sketch that the reconstruction uses.
        seed: of Omega.
        stream: of Omega.
        count: scalar float64 tensor, `sum w_t`.
        total: `(n,)`, `sum w_t x_t`.
        squares: `(n,)`, `sum w_t x_t^2`.
        product: `(n, k + PROBES)`, `sum w_t x_t (x_t^T Omega)`.
    """

    kind = "input_sketch"
    form = "sketch"
    arguments = ("features", "size", "seed", "stream")
    fields = ("count", "total", "squares", "product")
    main = "product"

    def __init__(
        self,
        features: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        size: int,
        seed: int = 0,
        stream: int = 0,
    ) -> None:
        """Start at zero; `device` and `dtype` (float32, or float64 for reference work) are those of the sums."""
        self.features, self.size, self.seed, self.stream = features, size, seed, stream
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(features, dtype=dtype, device=device)
        self.squares = torch.zeros(features, dtype=dtype, device=device)
        self.product = torch.zeros(features, size + PROBES, dtype=dtype, device=device)

    def _add_rows(self, x: torch.Tensor, weight: torch.Tensor | None) -> None:
        sketch_(self.product, x, x, weight, seed=self.seed, stream=self.stream, kind=KIND, column_sum=self.total)
        gradient_statistics_(None, self.squares, x, fisher_weight=weight)

    def trace(self, *, center: bool = True) -> float:
        """The exact trace of the covariance, or of the raw second moment `M / N`."""
        raw = float(self.squares.sum(dtype=torch.float64)) / self.tokens
        return max(0.0, raw - float(self.mean().square().sum())) if center else raw

    def covariance(self, *, center: bool = True) -> torch.Tensor:
        """The covariance, or the raw second moment `M / N`, `(n, n)` float64, as far as the sketch knows it."""
        pairs = self.components(min(self.size, self.features), center=center)
        return (pairs.vectors * pairs.values) @ pairs.vectors.mT

    def components(self, rank: int, *, center: bool = True) -> TopEigenpairs:
        """The leading eigenpairs of the covariance, reconstructed from the sketch, and how far off they can be.

        Args:
            rank: number of pairs, at most the size of the sketch.
            center: subtract the mean's outer product (the sketch of `mu mu^T` is known exactly).

        Returns:
            Eigenpairs with a bound on their residuals. What the approximation leaves is positive semidefinite, so its
            trace, which is known, bounds its norm; most often its images of random probes give a smaller bound.

        Raises:
            ValueError: if no token was counted, or `rank` exceeds the size of the sketch.
        """
        tokens = self.check_counted()
        if rank > self.size:
            raise ValueError(
                f"{rank} components are asked of a sketch with {self.size} columns: collect with sketch_size={2 * rank}"
            )
        omega = _draw(self.features, self.size + PROBES, self.seed, self.stream, self.product)
        product = self.product.to(torch.float64) / tokens
        if center:
            mean = self.mean()
            product.addr_(mean, mean @ omega, alpha=-1.0)
        size = min(self.size, self.features)
        values, vectors = nystrom(product[:, :size], omega[:, :size])
        # A pair of the approximation leaves M v - value v = (M - approximation) v.
        rest = product[:, self.size :] - (vectors * values) @ (vectors.mT @ omega[:, self.size :])
        trace = (self.trace(center=center) - values.sum()).clamp_min(0)
        error = torch.where(values[0] > 0, torch.minimum(probe_bound(rest), trace) / values[0], 0.0)
        return TopEigenpairs(values[:rank], vectors[:, :rank], error, "nystrom")


def _draw(rows: int, columns: int, seed: int, stream: int, like: torch.Tensor) -> torch.Tensor:
    """What `sketch_` multiplied by for sums `like` these, in float64."""
    drawn = random_matrix(rows, columns, kind=KIND, seed=seed, stream=stream, dtype=like.dtype, device=like.device)
    return drawn.to(torch.float64)


class GradientSketch(Accumulator):
    """A two-sided sketch of a weight gradient G: `G Omega` and `Psi G`.

    Attributes:
        out_features: m.
        in_features: n.
        size: k, columns of `G Omega`.
        co_size: l, rows of `Psi G`; at least k for a stable reconstruction.
        count: scalar float64 tensor, the rows of the layer; not counted by `update`.
        left: `(m, k + PROBES)`, `sum w_t g_t (x_t^T Omega)`.
        right: `(n, l)`, `sum w_t x_t (g_t^T Psi^T)`.
    """

    kind = "gradient_sketch"
    statistic = GRADIENT
    words = "weight gradient"
    form = "sketch"
    arguments = ("out_features", "in_features", "size", "co_size", "seed", "stream")
    fields = ("count", "left", "right")
    main = "left"
    vector = ""
    reads_input = True

    def __init__(
        self,
        out_features: int,
        in_features: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        size: int,
        co_size: int,
        seed: int = 0,
        stream: int = 0,
    ) -> None:
        """Start at zero; `seed` is that of both random matrices, `stream` of Omega (Psi uses its complement)."""
        self.out_features, self.in_features = out_features, in_features
        self.size, self.co_size, self.seed, self.stream = size, co_size, seed, stream
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.left = torch.zeros(out_features, size + PROBES, dtype=dtype, device=device)
        self.right = torch.zeros(in_features, co_size, dtype=dtype, device=device)

    @property
    def _co_stream(self) -> int:
        return self.stream ^ 0xFFFFFFFF

    def update(self, g: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        """Add output gradients `(..., m)` and inputs `(..., n)`; weight `(...)` is a bool selection or real."""
        g, x = as_rows(g, self.left.dtype), as_rows(x, self.left.dtype)
        sketch_(self.left, g, x, weight, seed=self.seed, stream=self.stream, kind=KIND)
        sketch_(self.right, x, g, weight, seed=self.seed, stream=self._co_stream, kind=KIND)

    def add(self, call: OutputGradients) -> None:
        """Add the gradients of a call."""
        assert call.x is not None  # it reads inputs
        self.update(call.g, call.x, call.factors)

    def mean_over(self, loss_items: float) -> torch.Tensor:
        """The gradient of the mean loss, `(m, n)` float64."""
        triplets = self.svd(min(self.size, self.in_features, self.out_features), scale=1.0 / loss_items)
        return (triplets.U * triplets.S) @ triplets.Vh

    def svd(self, rank: int, *, scale: float = 1.0) -> RandomizedSVD:
        """The leading singular triplets of `scale * G`, reconstructed from the sketch.

        Args:
            rank: number of triplets, at most k.
            scale: factor, such as one over the number of loss items.

        Returns:
            `U`, `S`, `Vh` in float64, with a bound on the spectral norm of what they leave of `scale * G` (see
            `linalg.probe_bound`).

        Raises:
            ValueError: if `rank` exceeds the size of the sketch.
        """
        if rank > self.size:
            raise ValueError(
                f"{rank} triplets are asked of a sketch with {self.size} columns: collect with sketch_size={2 * rank}"
            )
        omega = _draw(self.in_features, self.size + PROBES, self.seed, self.stream, self.left)
        psi = _draw(self.out_features, self.co_size, self.seed, self._co_stream, self.left).mT
        left, right = self.left.to(torch.float64) * scale, self.right.to(torch.float64).mT * scale
        size = min(self.size, self.out_features, self.in_features)
        probe = (omega[:, self.size :], left[:, self.size :])
        return two_sided(left[:, :size], right, omega[:, :size], psi, rank, probe)
