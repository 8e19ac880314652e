"""A full LoRA-Pro step against torch.

Adam on the full gradient of each layer, and the adjustment of the factors' gradients, for the layers of a small Llama:

    faithful    what the authors do, in torch: pseudo-inverses, a Sylvester equation by the general (complex)
                eigendecomposition, an m x m projector, a pass over memory for each operation on the moments
    careful     the same numbers by symmetric eigendecompositions, without the projector, operations in place
    ours        `lk.training.LoraPro`
    op          `lora_pro_adam_` alone, the part that is bound by memory and products

All are checked against each other first and timed in turn. The floor: the bytes of the moments, and the FLOPs of their
pass, over what this machine copies and multiplies per second. The `efficient` step, whose state has the size of
the factors, is timed against `torch.optim.AdamW(foreach=True)` on the same factors.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import lora_kernels as lk
from benchmarks import records
from benchmarks.rates import Floor, here
from benchmarks.subject import Row, Subject
from lora_kernels.ops import lora_pro_adam_

LAYERS = ((1024, 1024),) * 14 + ((1024, 2752),) * 4
RANK, SCALING, RATE, BETAS, EPS, DAMPING = 16, 2.0, 1e-4, (0.9, 0.999), 1e-8, 1e-8
PEAK_SIDES = ("faithful", "careful", "ours")
PEERS = {"faithful": "the authors' procedure", "careful": "careful torch", "adamw": "AdamW, no adjustment"}
# Theirs over ours; AdamW does less, of which the step may take 2.5 times as long.
TARGETS = {"faithful": 15.0, "careful": 2.5, "adamw": 0.4}


@dataclass
class Layer:
    """One pair of factors, the gradients of the loss, and the state of the torch versions."""

    a: torch.Tensor  # (r, n)
    b: torch.Tensor  # (m, r)
    grad_a: torch.Tensor
    grad_b: torch.Tensor
    moments: tuple[torch.Tensor, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        """Moments of zero."""
        shape = (self.b.shape[0], self.a.shape[1])
        self.moments = torch.zeros(shape), torch.zeros(shape)

    def copy(self) -> Layer:
        """The same numbers in other memory, moments of zero."""
        return Layer(self.a.clone(), self.b.clone(), self.grad_a.clone(), self.grad_b.clone())


def make(shapes: tuple[tuple[int, int], ...], rank: int) -> list[Layer]:
    """Layers in the middle of training: B is no longer zero."""
    torch.manual_seed(0)
    layers = []
    for m, n in shapes:
        factors = torch.randn(rank, n) / n**0.5, 0.1 * torch.randn(m, rank)
        layers.append(Layer(*factors, torch.randn(rank, n), torch.randn(m, rank)))
    return layers


def _adam(layer: Layer, e: torch.Tensor, step: int) -> torch.Tensor:
    avg, square = layer.moments
    avg.mul_(BETAS[0]).add_(e, alpha=1 - BETAS[0])
    square.mul_(BETAS[1]).addcmul_(e, e, value=1 - BETAS[1])
    return (avg / (1 - BETAS[0] ** step)) / ((square / (1 - BETAS[1] ** step)).sqrt() + EPS)


def faithful(layer: Layer, step: int) -> None:
    """One layer as the authors' procedure goes, operation by operation."""
    a, b, s = layer.a, layer.b, SCALING
    damping = DAMPING * torch.eye(a.shape[0])
    a_inverse = torch.linalg.pinv(a @ a.T + damping)
    b_inverse = torch.linalg.pinv(b.T @ b + damping)
    projector = torch.eye(b.shape[0]) - b @ b_inverse @ b.T  # (m, m)
    grad_a = b_inverse @ layer.grad_a / s**2
    grad_b = projector @ layer.grad_b @ a_inverse / s**2
    h = _adam(layer, s * (b @ grad_a) + s * (grad_b @ a), step)
    grad_a, grad_b = s * b.T @ h, s * h @ a.T
    # The Sylvester equation of the adjustment, by general eigendecompositions of both its matrices.
    right = -(b_inverse @ grad_a @ a.T) / s**2
    p, left_vectors = torch.linalg.eig(b.T @ b)
    q, right_vectors = torch.linalg.eig(a @ a.T)
    inner = torch.linalg.inv(left_vectors) @ right.to(p.dtype) @ right_vectors
    x = (left_vectors @ (inner / (p[:, None] + q[None, :])) @ torch.linalg.inv(right_vectors)).real
    layer.a -= RATE * (b_inverse @ grad_a / s**2 + x @ a)
    layer.b -= RATE * (projector @ grad_b @ a_inverse / s**2 - b @ x)


def _projected(b: torch.Tensor, b_inverse: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x - b @ (b_inverse @ (b.T @ x))


def careful(layer: Layer, step: int) -> None:
    """One layer in torch as one would write it for speed; E and H are stored."""
    a, b, s = layer.a, layer.b, SCALING
    (p, left_vectors), (q, right_vectors) = torch.linalg.eigh(b.T @ b), torch.linalg.eigh(a @ a.T)
    b_inverse = left_vectors @ (left_vectors / (p + DAMPING)).T
    a_inverse = right_vectors @ (right_vectors / (q + DAMPING)).T
    grad_a = b_inverse @ layer.grad_a / s**2
    grad_b = _projected(b, b_inverse, layer.grad_b) @ a_inverse / s**2
    avg, square = layer.moments
    e = torch.mm(torch.cat((s * b, s * grad_b), 1), torch.cat((grad_a, a)))
    avg.mul_(BETAS[0]).add_(e, alpha=1 - BETAS[0])
    square.mul_(BETAS[1]).addcmul_(e, e, value=1 - BETAS[1])
    root = torch.sqrt(square, out=e).mul_((1 - BETAS[1] ** step) ** -0.5).add_(EPS)
    h = torch.div(avg, root, out=root)
    factor = s / (1 - BETAS[0] ** step)
    grad_a, grad_b = factor * (b.T @ h), factor * (h @ a.T)
    inner = left_vectors.T @ (-(b_inverse @ grad_a @ a.T) / s**2) @ right_vectors
    x = left_vectors @ (inner / (p[:, None] + q[None, :])) @ right_vectors.T
    layer.a -= RATE * (b_inverse @ grad_a / s**2 + x @ a)
    layer.b -= RATE * (_projected(b, b_inverse, grad_b) @ a_inverse / s**2 - b @ x)


def stepper(side: str, layers: list[Layer]) -> Callable[[], None]:
    """A call that makes one step of all layers."""
    if side in ("faithful", "careful"):
        update, count = {"faithful": faithful, "careful": careful}[side], 0

        def run() -> None:
            nonlocal count
            count += 1
            for layer in layers:
                update(layer, count)

        return run
    if side == "op":
        number = 0

        def run_op() -> None:
            nonlocal number
            number += 1
            for one in layers:
                lora_pro_adam_(
                    *one.moments, one.a, one.b, one.grad_a, one.grad_b,
                    scaling=SCALING, betas=BETAS, eps=EPS, step=number,
                )  # fmt: skip

        return run_op
    return optimizer(layers, "full")


# The one place where the optimizer comes in.
def optimizer(layers: list[Layer], mode: str) -> Callable[[], None]:
    """The step of `lk.training.LoraPro`, whose parameters share the layers' memory."""
    pairs = [(torch.nn.Parameter(one.a), torch.nn.Parameter(one.b)) for one in layers]
    for (a, b), one in zip(pairs, layers, strict=True):
        a.grad, b.grad = one.grad_a, one.grad_b
    group = {"pairs": pairs, "scaling": SCALING}
    instance: Any = lk.training.LoraPro([group], lr=RATE, betas=BETAS, eps=EPS, weight_decay=0.0, mode=mode)
    return instance.step


def adamw(layers: list[Layer]) -> Callable[[], Any]:
    """Torch's AdamW on the same factors."""
    parameters = [torch.nn.Parameter(tensor) for layer in layers for tensor in (layer.a, layer.b)]
    grads = [tensor for layer in layers for tensor in (layer.grad_a, layer.grad_b)]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    return torch.optim.AdamW(parameters, lr=RATE, foreach=True).step


def check(shapes: tuple[tuple[int, int], ...], rank: int, sides: tuple[str, ...]) -> dict[str, float]:
    """Three steps of each side on the first and last layer, relative to the first side's change of the factors."""
    start = make((shapes[0], shapes[-1]), rank)
    ends = {}
    for side in sides:
        layers = [layer.copy() for layer in start]
        step = stepper(side, layers)
        for _ in range(3):
            step()
        ends[side] = [factor - before for layer, first in zip(layers, start, strict=True)
                      for factor, before in ((layer.a, first.a), (layer.b, first.b))]  # fmt: skip
    first = ends[sides[0]]
    return {
        side: max(float((one - other).norm() / other.norm()) for one, other in zip(ends[side], first, strict=True))
        for side in sides[1:]
    }


def peak(side: str, shapes: tuple[tuple[int, int], ...], rank: int) -> int:
    """Bytes that a side's second step takes beyond what is there before it, in this process."""
    step = stepper(side, make(shapes, rank))
    step()
    return records.extra_peak(step)


def peaks(shapes: tuple[tuple[int, int], ...], rank: int, sides: tuple[str, ...]) -> dict[str, int]:
    """The same of each side, in a process of its own; nothing where there is no Linux."""
    calls = {side: f"from {__name__} import peak; print(peak({side!r}, {shapes!r}, {rank}))" for side in sides}
    return records.peaks(calls)


def floor(shapes: tuple[tuple[int, int], ...], rank: int) -> Floor:
    """The moments, read and written, and the products of their pass."""
    parameters = sum(m * n for m, n in shapes)
    return Floor(8.0 * rank * parameters, 16.0 * parameters, here(), "float32")


def full(options: argparse.Namespace) -> dict[str, Any]:
    """Compare, time and measure the full step."""
    shapes = LAYERS[-5:-3] if options.quick else LAYERS
    differences = check(shapes, options.rank, PEAK_SIDES)
    if max(differences.values()) > 1e-2:
        raise SystemExit(f"the steps differ: {differences}")
    calls = {side: stepper(side, make(shapes, options.rank)) for side in (*PEAK_SIDES, "op")}
    times = records.interleaved(calls, options.rounds)
    del calls
    return {
        "layers": [list(shape) for shape in shapes],
        "rank": options.rank,
        "differences": differences,
        "seconds": times,
        "faithful_over_ours": times["faithful"]["p50"] / times["ours"]["p50"],
        "careful_over_ours": times["careful"]["p50"] / times["ours"]["p50"],
        "floor": floor(shapes, options.rank).record(),
        "peak_extra_bytes": peaks(shapes, options.rank, PEAK_SIDES),
        "moment_bytes": 8 * sum(m * n for m, n in shapes),
    }


def efficient(options: argparse.Namespace) -> dict[str, Any]:
    """Time the efficient step against AdamW on the same factors."""
    shapes = LAYERS[-5:-3] if options.quick else LAYERS
    calls = {"adamw": adamw(make(shapes, options.rank)), "ours": optimizer(make(shapes, options.rank), "efficient")}
    times = records.interleaved(calls, options.rounds)
    # Both factors, their gradients and two moments each: read, and written but for the gradients.
    moved = 4.0 * 7 * options.rank * sum(m + n for m, n in shapes)
    return {
        "layers": [list(shape) for shape in shapes],
        "rank": options.rank,
        "seconds": times,
        "ours_over_adamw": times["ours"]["p50"] / times["adamw"]["p50"],
        "floor": Floor(0.0, moved, here(), "float32").record(),
    }


def rows(entry: Mapping[str, Any]) -> list[Row]:
    """Against each way in torch."""
    times, least = entry["seconds"], entry.get("floor", {}).get("seconds")
    mode = "efficient" if "adamw" in times else "full"
    return [
        Row(f"{mode} step", PEERS[side], times["ours"]["p50"], times[side]["p50"], least, TARGETS[side])
        for side in PEERS
        if side in times
    ]


def notes(entry: Mapping[str, Any]) -> list[str]:
    """Memory and differences, of the full step."""
    if "peak_extra_bytes" not in entry:
        return []
    extra = ", ".join(f"{side} {size / 1e6:.1f} MB" for side, size in entry["peak_extra_bytes"].items())
    return [f"most extra memory: {extra}; largest difference {max(entry['differences'].values()):.1e}"]


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rank", type=int, default=RANK)


SUBJECT = Subject(
    name="lora_pro",
    about="A LoRA-Pro step against the authors' procedure and a careful version in torch, which must make the same "
    "step; the efficient one against AdamW on the same factors.",
    cases={"full": full, "efficient": efficient},
    rows=rows,
    notes=notes,
    full=("full", "efficient"),
    quick=("full", "efficient"),
    rounds=7,
    options=_options,
)
