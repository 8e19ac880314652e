"""Spectrum, norms, ranks and balance of an update `s B A` from r x r matrices: the product is never formed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from lora_kernels._checks import check_number, check_range, check_tensor, check_type, repr_short
from lora_kernels.landscape.weights import WeightNorms
from lora_kernels.ops._autocast import without_autocast
from lora_kernels.ops.small_linalg.spectrum import factor_spectrum

# Singular values below this share of the largest do not count towards the numerical rank. Weight decay takes
# directions without a loss gradient to zero exponentially; the others stay well above.
RANK_TOLERANCE = 1e-2
# Entries of factors that are converted to float64 at a time (64 MB).
_CHUNK = 2**23
# Entries of factors that are stacked for one batched call (256 MB in float32).
_STACK = 2**26
_Numbers = tuple[list[float], float, float, float]  # singular values of `B A`, `|A|_F`, `|B|_F` and balance


@dataclass(frozen=True)
class Adapter:
    """The factors of one layer, `W + s B A`.

    Attributes:
        name: the layer.
        a: `(r, n)`, any float dtype.
        b: `(m, r)`, likewise.
        scaling: s.
        weight: norms of W, if known.
        start: the factors A and B at the start of training, if known (same scaling).

    Raises:
        TypeError: if a factor is not a float tensor.
        ValueError: if the shapes of the factors do not match.
    """

    name: str
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    weight: WeightNorms | None = None
    start: tuple[torch.Tensor, torch.Tensor] | None = None

    def __post_init__(self) -> None:
        check_type("scaling", self.scaling, (int, float), "a number")
        pair = self.start if isinstance(self.start, (tuple, list)) and len(self.start) == 2 else None
        if pair is None:
            check_type("start", self.start, type(None), "None or two factors")
        for a, b in ((self.a, self.b), *(() if pair is None else (pair,))):
            check_tensor("a", a)
            check_tensor("b", b)
            if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
                raise ValueError(
                    f"layer {self.name} has factors of shapes {tuple(a.shape)} and {tuple(b.shape)}, "
                    "but must have A (r, n) and B (m, r)"
                )
        if not abs(self.scaling) < 2**1023:
            raise ValueError(f"layer {self.name} has scaling {self.scaling!r}, but must be finite")


@dataclass(frozen=True)
class Spectrum:
    """One layer's update `s B A`, measured.

    Attributes:
        name: the layer.
        shape: (m, n).
        rank: r, rows of A.
        scaling: s.
        status: `ok`, `zero` (the update is zero), or `not_finite` (NaN or infinite factors: all numbers are NaN, all
            ranks 0).
        values: the r singular values of `s B A`, descending.
        nuclear: nuclear norm, the sum of the values.
        frobenius: Frobenius norm.
        numerical_rank: number of values above `rank_tolerance` times the largest.
        rank_tolerance: relative to the largest value.
        stable_rank: `|.|_F^2 / |.|_2^2`, between 1 and the rank; 0 for a zero update.
        entropy_rank: exponential of the entropy of the values divided by their sum (Roy and Vetterli 2007); the same
            range.
        norm_a: `|A|_F`.
        norm_b: `|B|_F`.
        balance: `|A A^T - B^T B|_F / (|A|_F^2 + |B|_F^2)`, between 0 and 1; zero at every stationary point under weight
            decay, and 1 while B is zero and A has rank one.
        weight: norms of the base weight, if given.
        drift: `|s B A - s B0 A0|_F`, the distance from the start, if that was given.
    """

    derived: ClassVar[tuple[str, ...]] = ("spectral", "spectral_share", "frobenius_share")

    name: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    status: str
    values: tuple[float, ...]
    nuclear: float
    frobenius: float
    numerical_rank: int
    rank_tolerance: float
    stable_rank: float
    entropy_rank: float
    norm_a: float
    norm_b: float
    balance: float
    weight: WeightNorms | None = None
    drift: float | None = None

    @property
    def usable_rank(self) -> int:
        """The largest rank that the update can have."""
        return min(self.rank, *self.shape)

    @property
    def spectral(self) -> float:
        """The largest singular value; NaN where the factors are not finite, 0 without rank."""
        return self.values[0] if self.values else math.nan if self.status == "not_finite" else 0.0

    @property
    def spectral_share(self) -> float | None:
        """`|s B A|_2 / |W|_2`; `None` without the weight."""
        return None if self.weight is None else _share(self.spectral, self.weight.spectral)

    @property
    def frobenius_share(self) -> float | None:
        """`|s B A|_F / |W|_F`; `None` without the weight."""
        return None if self.weight is None else _share(self.frobenius, self.weight.frobenius)


def _share(part: float, whole: float) -> float:
    if math.isnan(part) or math.isnan(whole):
        return math.nan
    return part / whole if whole > 0 else 0.0 if part == 0 else math.inf


@without_autocast()
def factor_spectra(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]], scalings: Sequence[float] | float = 1.0
) -> list[torch.Tensor]:
    """Singular values of `s B A` for pairs of any shapes, one batched call per shape.

    Args:
        factors: pairs of A `(r, n)` and B `(m, r)`; 16-bit factors are widened to float32.
        scalings: one s per pair, or one for all.

    Returns:
        Per pair `(r,)` float64 on its device, descending; all NaN if a factor holds NaN or infinite entries.

    Raises:
        TypeError: if a factor is not a float tensor, or a scaling is not a number.
        ValueError: if the number of scalings is not that of the pairs, or the shapes of a pair do not match.
    """
    check_type("factors", factors, (tuple, list), "a sequence of pairs")
    for index, pair in enumerate(factors):
        _check_pair(f"factors[{index}]", pair)
    check_type("scalings", scalings, (int, float, tuple, list), "a number or numbers")
    scaling_of = [scalings] * len(factors) if isinstance(scalings, (int, float)) else list(scalings)
    for scaling in scaling_of:
        check_number("scalings", scaling)
    if len(scaling_of) != len(factors):
        raise ValueError(f"scalings has {len(scaling_of)} entries, but must have {len(factors)}, one per pair")
    spectra: dict[int, torch.Tensor] = {}
    for indices, a, b in _buckets(factors):
        for index, values in zip(indices, _measured(a, b)[0], strict=True):
            spectra[index] = values * abs(scaling_of[index])
    return [spectra[index] for index in range(len(factors))]


def _check_pair(name: str, pair: object) -> None:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name} must be a pair of tensors, got {type(pair).__name__} {repr_short(pair)}")
    check_tensor(f"{name}[0]", pair[0], shape=(None, None), numbers=True)
    check_tensor(f"{name}[1]", pair[1], shape=(None, pair[0].shape[0]), numbers=True)


def _buckets(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Yield indices and stacks of A and of B: of one shape, dtype and device, not too many (of experts, say)."""
    buckets: dict[tuple[torch.Size, torch.Size, torch.device, torch.dtype], list[int]] = defaultdict(list)
    for index, (a, b) in enumerate(factors):
        dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
        buckets[a.shape, b.shape, a.device, dtype].append(index)
    for (shape_a, shape_b, _, dtype), members in buckets.items():
        step = max(1, _STACK // max(1, shape_a.numel() + shape_b.numel()))
        for low in range(0, len(members), step):
            indices = members[low : low + step]
            a, b = (torch.stack([factors[index][side].detach().to(dtype) for index in indices]) for side in (0, 1))
            yield indices, a, b.to(a.device)


def _measured(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular values of `B A` `(batch, r)`, `|A|_F`, `|B|_F` and balance `(batch,)`; float64, NaN if not finite."""
    count, rank = a.shape[:2]
    norm_a, norm_b = (torch.linalg.vector_norm(factor, dim=(-2, -1), dtype=torch.float64) for factor in (a, b))
    finite = torch.isfinite(norm_a) & torch.isfinite(norm_b)
    if not bool(finite.all()):
        nan = torch.full((count,), math.nan, dtype=torch.float64, device=a.device)
        values, balance = nan.unsqueeze(-1).repeat(1, rank), nan.clone()
        if bool(finite.any()):
            values[finite], _, _, balance[finite] = _measured(a[finite], b[finite])
        return values, torch.where(finite, norm_a, nan), torch.where(finite, norm_b, nan), balance
    values = factor_spectrum(a, b).to(torch.float64)
    if rank:
        # Products that overflow or underflow in float32 are computed in float64.
        lost = ~torch.isfinite(values[:, 0]) | ((values[:, 0] == 0) & (norm_a > 0) & (norm_b > 0))
        if a.dtype == torch.float32 and bool(lost.any()):
            values[lost] = factor_spectrum(a[lost].double(), b[lost].double())
    return values, norm_a, norm_b, _balance(a, b, norm_a, norm_b)


def _balance(a: torch.Tensor, b: torch.Tensor, norm_a: torch.Tensor, norm_b: torch.Tensor) -> torch.Tensor:
    """`|A A^T - B^T B|_F / (|A|_F^2 + |B|_F^2)`, `(batch,)`; 0 where both factors are zero."""
    # Divided by the larger norm first, so that no square overflows or underflows.
    scale = torch.maximum(norm_a, norm_b)
    scale = torch.where(scale > 0, scale, 1.0)
    step = max(1, _CHUNK // max(1, a.shape[1] * max(a.shape[2], b.shape[1])))
    parts = []
    for low in range(0, a.shape[0], step):
        divisor = scale[low : low + step, None, None]
        wide_a, wide_b = a[low : low + step].double() / divisor, b[low : low + step].double() / divisor
        parts.append(torch.linalg.matrix_norm(wide_a @ wide_a.mT - wide_b.mT @ wide_b))
    total = (norm_a / scale).square() + (norm_b / scale).square()
    difference = torch.cat(parts) if parts else total
    return torch.where(total > 0, difference / torch.where(total > 0, total, 1.0), 0.0)


@without_autocast()
def measure(adapters: Sequence[Adapter], *, rank_tolerance: float = RANK_TOLERANCE) -> dict[str, Spectrum]:
    """Measure adapters, those of one shape in one batch. Adapters that are zero or not finite are not errors.

    Args:
        adapters: the layers.
        rank_tolerance: share of the largest singular value below which one does not count.

    Returns:
        Spectra by layer name, in the given order.

    Raises:
        TypeError: if an entry is not an `Adapter`.
        ValueError: if the tolerance is out of range, or a factor is on the meta device.
    """
    check_type("adapters", adapters, (tuple, list), "a sequence of Adapter")
    for adapter in adapters:
        check_type("adapters", adapter, Adapter, "a sequence of Adapter")
        _check_pair(adapter.name, (adapter.a, adapter.b))
    check_range("rank_tolerance", rank_tolerance, low=0.0, high=1.0)
    numbers: dict[int, _Numbers] = {}
    for indices, a, b in _buckets([(adapter.a, adapter.b) for adapter in adapters]):
        columns = (column.tolist() for column in _measured(a, b))  # four transfers per bucket
        numbers.update(zip(indices, zip(*columns, strict=True), strict=True))
    drifts = _drifts(adapters)
    return {
        adapter.name: _spectrum(adapter, numbers[index], rank_tolerance, drifts.get(index))
        for index, adapter in enumerate(adapters)
    }


def _drifts(adapters: Sequence[Adapter]) -> dict[int, float]:
    """`|s B A - s B0 A0|_F` by index where the start is known: the norm of `[B, -B0] [A; A0]`."""
    indices, pairs, scalings = [], [], []
    for index, adapter in enumerate(adapters):
        if adapter.start is not None:
            factors = [factor.detach().to(adapter.a.device) for factor in (adapter.a, adapter.b, *adapter.start)]
            a, b, a0, b0 = (factor if factor.dtype == torch.float64 else factor.float() for factor in factors)
            indices.append(index)
            pairs.append((torch.cat((a, a0)), torch.cat((b, -b0), dim=-1)))
            scalings.append(adapter.scaling)
    spectra = factor_spectra(pairs, scalings)
    return {index: float(torch.linalg.vector_norm(values)) for index, values in zip(indices, spectra, strict=True)}


def _spectrum(adapter: Adapter, numbers: _Numbers, rank_tolerance: float, drift: float | None) -> Spectrum:
    values, norm_a, norm_b, balance = numbers
    scaled = tuple(abs(adapter.scaling) * value for value in values)
    finite = not any(math.isnan(value) for value in (*scaled, norm_a, norm_b))
    largest = scaled[0] if scaled else 0.0
    nuclear = frobenius = stable = entropy = 0.0
    if not finite:
        nuclear = frobenius = stable = entropy = math.nan
    elif largest > 0:
        relative = [value / largest for value in scaled]
        energy, total = math.fsum(value * value for value in relative), math.fsum(relative)
        nuclear, frobenius, stable = total * largest, math.sqrt(energy) * largest, energy
        shares = [value / total for value in relative]
        entropy = math.exp(-math.fsum(share * math.log(share) for share in shares if share > 0))
    return Spectrum(
        name=adapter.name,
        shape=(adapter.b.shape[0], adapter.a.shape[1]),
        rank=adapter.a.shape[0],
        scaling=adapter.scaling,
        status="not_finite" if not finite else "ok" if largest > 0 else "zero",
        values=scaled,
        nuclear=nuclear,
        frobenius=frobenius,
        numerical_rank=sum(value > rank_tolerance * largest for value in scaled) if finite else 0,
        rank_tolerance=rank_tolerance,
        stable_rank=stable,
        entropy_rank=entropy,
        norm_a=norm_a,
        norm_b=norm_b,
        balance=balance,
        weight=adapter.weight,
        drift=drift,
    )


def directions(adapter: Adapter, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading singular triplets of `s B A`, without forming it.

    Args:
        adapter: the factors, with finite entries.
        count: number of triplets, at most min(r, m, n).

    Returns:
        U `(m, count)`, S `(count,)` and V `(n, count)`, float64, on the factors' device.

    Raises:
        TypeError: if `adapter` is not an `Adapter`.
        ValueError: if the count is out of range, or a factor is not finite or on the meta device.
    """
    check_type("adapter", adapter, Adapter, "an Adapter")
    _check_pair(adapter.name, (adapter.a, adapter.b))
    check_range("count", count, low=0, high=min(*adapter.a.shape, adapter.b.shape[0]), integer=True)
    for name, factor in (("A", adapter.a), ("B", adapter.b)):
        if not bool(torch.isfinite(factor).all()):
            raise ValueError(f"{name} of layer {adapter.name} holds NaN or infinite entries")
    left, core_b = torch.linalg.qr(adapter.b.detach().to(torch.float64))
    right, core_a = torch.linalg.qr(adapter.a.detach().to(torch.float64).mT)
    u, s, vh = torch.linalg.svd(core_b @ core_a.mT)
    # A negative scaling flips the directions of one side.
    sign = 1.0 if adapter.scaling >= 0 else -1.0
    return left @ u[:, :count] * sign, s[:count] * abs(adapter.scaling), right @ vh.mT[:, :count]
