"""`lk.suggest_learning_rate`: the loss along the optimizer's own first step, and the rate that follows from it."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from torch import distributed, nn

from lora_kernels._checks import check_choice, check_range, check_type
from lora_kernels.adapters.dora import caching_enabled
from lora_kernels.reports import Report, Table
from lora_kernels.runtime.feed import model_device, to_device
from lora_kernels.runtime.loss import Loss, Reduction, summed_loss
from lora_kernels.runtime.modes import holding, is_sharded, observation_mode
from lora_kernels.runtime.processes import gather, raise_together, together, unwrap, world_size
from lora_kernels.statistics.options import Forward
from lora_kernels.training.lora_pro import LoraPro
from lora_kernels.training.lora_pro.model import find_pairs

Tensors = list[torch.Tensor]


class Share(NamedTuple):
    """Suitable rates, as shares of the rate at which the line turns."""

    low: float
    rate: float
    high: float


# Calibrated on SmolLM2-135M, GSM8K and generated word problems (docs/learning_rate.md): `rate` is about the mean share
# of the swept best rates, `low` to `high` holds them all.
SHARES = {"adamw": Share(0.25, 0.5, 3.0), "lora_pro": Share(0.25, 0.5, 3.0), "lora_pro_full": Share(0.07, 0.2, 0.5)}
OPTIMIZERS = tuple(SHARES)
# The line is measured at powers of 10^(1/2), from here, and twice as densely around its lowest point.
_FIRST, _PER_DECADE, _LOWEST, _HIGHEST = 1e-3, 2, -16, 8
# A line whose loss falls by a smaller share does not speak for training: that of a new head, say.
_LEAST_FALL = 0.05
# How far the first step goes before the gradient of factors is asked for that had none (A, while B = 0).
_SECOND_STEP = 1e-4
_EPS = 1e-8  # of AdamW, and of LoRA-Pro


@dataclass(frozen=True, kw_only=True)
class LearningRateAdvice(Report):
    """What `suggest_learning_rate` measured.

    Attributes:
        optimizer: for which the rate is.
        rate: the suggestion, or `None` where the line does not tell one.
        low: the smallest rate that is worth a try.
        high: the largest one.
        turn: the rate at which the loss along the first step is lowest, or `None`; also where it gives no rate.
        line: pairs of a rate and the mean loss there, in the order of the rates; the first rate is 0. Losses that
            overflow are infinite.
        batches: number of batches whose loss this is, on all processes.
        forward_passes: forward passes of a batch, those with a backward pass included.
        backward_passes: backward passes.
        seconds: wall time.
        reason: why there is no rate, in words, or `None`.
    """

    optimizer: str
    rate: float | None = None
    low: float | None = None
    high: float | None = None
    turn: float | None = None
    line: tuple[tuple[float, float], ...] = ()
    batches: int = 0
    forward_passes: int = 0
    backward_passes: int = 0
    seconds: float = 0.0
    reason: str | None = None

    def summary(self) -> str:
        """One line: the rate, and what it is read from."""
        if self.rate is None:
            return f"learning rate for {self.optimizer}: none suggested, {self.reason}"
        return (
            f"learning rate for {self.optimizer}: {self.rate:.1e} ({self.low:.1e} to {self.high:.1e}); the loss along "
            f"the first step is lowest at {self.turn:.1e} ({self.forward_passes} forward and {self.backward_passes} "
            f"backward passes, {self.seconds:.2f} s)"
        )

    def judge(self, learning_rate: float) -> str | None:
        """A sentence on a rate of training outside of `low` to `high`; `None` where it lies inside or none is known."""
        if self.rate is None or self.low is None or self.high is None or self.low <= learning_rate <= self.high:
            return None
        where = "above" if learning_rate > self.high else "below"
        return (
            f"learning_rate={learning_rate:g} is {where} the range measured for {self.optimizer}, {self.low:.1e} to "
            f"{self.high:.1e}. Try {self.rate:.1e}"
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.line:
            table = Table("rate", "loss", "", title="loss along the first step")
            finite = [loss for _, loss in self.line if math.isfinite(loss)]
            low, start = min(finite), self.line[0][1]
            for rate, loss in self.line:
                length = 0 if loss > start or start == low else round(30 * (start - loss) / (start - low))
                table.add_row(f"{rate:.2g}", f"{loss:.4f}", "#" * length)
            table.caption = "bars: how far the loss falls"
            yield table
        yield Text(self.summary())


def find_turn(loss_at: Callable[[float], float], start: float) -> tuple[dict[float, float], float | None, str | None]:
    """The losses by rate (`start` at 0), and the rate at which the line is lowest, or `None` and why there is none."""
    # About eight points; the turn is that of a parabola through the lowest of them and its neighbours.
    points = {0.0: start}

    def measured(index: float) -> float:
        rate = _rate(index)
        if rate not in points:
            loss = loss_at(rate)
            points[rate] = loss if math.isfinite(loss) else math.inf
        return points[rate]

    best = 0
    while best > _LOWEST and measured(best) > start:  # from where the loss has exploded down to where it falls
        best -= 1
    for way in (1, -1):
        while _LOWEST <= best + way <= _HIGHEST and measured(best + way) < measured(best):
            best += way
    if not measured(best) < start:
        return points, None, "no rate lowers the loss of batches other than the step's"
    if best in (_LOWEST, _HIGHEST):
        return points, None, f"the loss along the first step is lowest at the last rate tried, {_rate(best):g}"
    around = [best - 1.0, best - 0.5, float(best), best + 0.5, best + 1.0]
    place = min(around[1:-1], key=measured)
    left, middle, right = ((_rate(index), measured(index)) for index in (place - 0.5, place, place + 0.5))
    return points, _vertex(left, middle, right), None


def _rate(index: float) -> float:
    return _FIRST * math.pow(10.0, index / _PER_DECADE)


def _vertex(left: tuple[float, float], middle: tuple[float, float], right: tuple[float, float]) -> float:
    """Where the parabola through three points is lowest, the middle one being the lowest of them."""
    (x0, y0), (x1, y1), (x2, y2) = left, middle, right
    rise, fall = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    bend = (fall - rise) / (x2 - x0)
    return (x0 + x1) / 2 - rise / (2 * bend) if math.isfinite(bend) and bend > 0 else x1


class _Probe:
    """A model whose trained parameters are moved, and put back; its loss and gradients."""

    def __init__(self, model: nn.Module, forward: Forward | None, loss: Loss | None, reduction: Reduction) -> None:
        self.model, self.settings = model, (forward, loss, reduction)
        self.parameters: Tensors = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.forward_passes = self.backward_passes = 0
        if not self.parameters:
            raise ValueError("model trains nothing: no parameter requires a gradient")
        if any(is_sharded(parameter) for parameter in self.parameters):
            raise ValueError("model trains sharded parameters (FSDP2): ask for a learning rate before it is sharded")
        if any(parameter.is_meta for parameter in self.parameters):
            raise ValueError("model trains parameters on the meta device: load their values first")

    @staticmethod
    def _summed(call: Callable[[], tuple[float, float]]) -> tuple[float, float]:
        """A sum and its count over all processes; a failure on one is a failure on all."""
        total, items = together(call)
        if world_size() > 1:
            total, items = (math.fsum(values) for values in zip(*gather((total, items)), strict=True))
        if items <= 0:
            raise ValueError("no item has a loss in the batches that were read: every label is -100")
        return total, items

    @torch.no_grad()
    def loss(self, batches: Sequence[Any]) -> float:
        """Mean loss over the items of batches."""

        def run() -> tuple[float, float]:
            sums = [summed_loss(self.model, batch, *self.settings) for batch in batches]
            self.forward_passes += len(sums)
            return math.fsum(float(total) for total, _ in sums), math.fsum(items for _, items in sums)

        total, items = self._summed(run)
        return total / items

    def gradients(self, batches: Sequence[Any]) -> Tensors:
        """Gradients of the mean loss by all parameters, zero where it does not depend on one."""
        wide = [torch.promote_types(parameter.dtype, torch.float32) for parameter in self.parameters]
        sums = [torch.zeros_like(part, dtype=dtype) for part, dtype in zip(self.parameters, wide, strict=True)]

        def run() -> tuple[float, float]:
            counted = 0.0
            with contextlib.ExitStack() as undo:
                for parameter in self.parameters:
                    undo.callback(parameter.requires_grad_(True).requires_grad_, False)
                for batch in batches:
                    total, items = summed_loss(self.model, batch, *self.settings)
                    if items <= 0:
                        continue
                    self.forward_passes, self.backward_passes = self.forward_passes + 1, self.backward_passes + 1
                    counted += items
                    if not total.requires_grad:
                        raise ValueError("the loss depends on no trained parameter (are the adapters merged?)")
                    parts = torch.autograd.grad(total, self.parameters, allow_unused=True)
                    for have, part in zip(sums, parts, strict=True):
                        if part is not None:
                            have += part
            return 0.0, counted

        _, counted = self._summed(run)
        if world_size() > 1:
            for have in sums:
                distributed.all_reduce(have)
        for have in sums:
            have /= counted
            if not bool(torch.isfinite(have).all()):
                raise ValueError("the gradient holds NaN or infinite entries")
        return sums

    def moved(self, rate: float, direction: Sequence[torch.Tensor]) -> contextlib.AbstractContextManager[None]:
        """Hold the parameters a step on."""
        pairs = ((parameter.data, step) for parameter, step in zip(self.parameters, direction, strict=True))
        values = (value.to(step.dtype).add(step, alpha=rate).to(value.dtype) for value, step in pairs)
        return holding(self.parameters, values)


def _first_step(probe: _Probe, optimizer: str, pairs: Sequence[Any], gradients: Tensors) -> Tensors:
    """The optimizer's first step from here, per unit of rate."""
    of = {id(parameter): gradient for parameter, gradient in zip(probe.parameters, gradients, strict=True)}
    # Adam's moments are those of one gradient.
    steps = {key: -gradient / (gradient.abs() + _EPS) for key, gradient in of.items()}
    for a, b, scaling, experts in pairs:  # of LoRA-Pro, by the optimizer itself on copies; one pair at a time
        if bool(of[id(a)].any()) or bool(of[id(b)].any()):
            before = [factor.detach().to(of[id(factor)].dtype) for factor in (a, b)]
            copies = [nn.Parameter(value.clone()) for value in before]
            for copy, factor in zip(copies, (a, b), strict=True):
                copy.grad = of[id(factor)].clone()
            group = {"pairs": [copies], "scaling": scaling, "experts": experts}
            LoraPro([group], 1.0, mode="full" if optimizer == "lora_pro_full" else "efficient", eps=_EPS).step()
            steps[id(a)], steps[id(b)] = (copy.detach() - value for copy, value in zip(copies, before, strict=True))
    return [steps[id(parameter)] for parameter in probe.parameters]


def _direction(probe: _Probe, optimizer: str, pairs: Sequence[Any], batches: Sequence[Any]) -> Tensors:
    """The first step; where a parameter has no gradient yet (A, while B = 0), its step once the others have moved."""
    gradients = probe.gradients(batches)
    steps = _first_step(probe, optimizer, pairs, gradients)
    idle = [not bool(gradient.any()) for gradient in gradients]
    # (LoRA-Pro's full mode moves A by a length that does not depend on the rate then: it has no line.)
    if all(idle) or not any(idle) or optimizer == "lora_pro_full":
        return steps
    with probe.moved(_SECOND_STEP, steps):
        later = _first_step(probe, optimizer, pairs, probe.gradients(batches))
    return [second if is_idle else first for first, second, is_idle in zip(steps, later, idle, strict=True)]


def advise(
    model: nn.Module, data: Iterable[Any] | None, optimizer: str, settings: Mapping[str, Any]
) -> LearningRateAdvice:
    """`suggest_learning_rate` for a report that is complete without it: what fails is the advice's reason."""
    if data is None or isinstance(data, Iterator):
        reason = "no data was given" if data is None else "the data can be read once only"
        return LearningRateAdvice(optimizer=optimizer, reason=reason)
    try:
        given = {name: settings[name] for name in ("forward", "loss", "reduction") if name in settings}
        return suggest_learning_rate(model, data, optimizer=optimizer, **given)
    except Exception as error:  # noqa: BLE001  (whatever a model does: the adapter has been started)
        return LearningRateAdvice(optimizer=optimizer, reason=f"{error or type(error).__name__}")


def suggest_learning_rate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    optimizer: str = "adamw",
    batches: int = 8,
    forward: Forward | None = None,
    loss: Loss | None = None,
    reduction: Reduction = "auto",
) -> LearningRateAdvice:
    """Suggest a learning rate for what a model trains, from where it stands.

    The optimizer's first step is computed from the gradient of some batches, and the loss of others is measured along
    it, at about eight rates. The suggestion is a share of the rate at which this line turns, one share for each
    optimizer (docs/learning_rate.md). The model runs in evaluation mode, and is left as it was to the bit.

    Args:
        model: with what it trains in place: every parameter that requires a gradient is moved, as in training
            (adapters of any kind, heads). DistributedDataParallel works: gradients and losses are those of all
            processes.
        data: yields batches, of the size that training has; only the first ones are read.
        optimizer: `adamw`, `lora_pro` (mode `efficient`) or `lora_pro_full`.
        batches: how many of them, on each process: one half for the gradient, the other for the loss.
        forward: as in `CollectOptions`.
        loss: as in `CollectOptions`.
        reduction: as in `CollectOptions`.

    Returns:
        The rate, the range around it, and the line; without a rate it has the reason.

    Raises:
        TypeError: on an argument of another type.
        ValueError: on an argument out of range, data without a batch or an item that has a loss, a loss or gradient
            that is not finite, and a model that trains nothing, or sharded parameters.
        RuntimeError: if another process failed.
    """
    started = time.perf_counter()
    model = unwrap(model)
    check_type("data", data, Iterable, "an iterable of batches")
    check_choice("optimizer", optimizer, OPTIMIZERS)
    check_range("batches", batches, low=1, integer=True)
    if caching_enabled():
        raise ValueError("DoRA's norms are cached inside of peft.helpers.DoraCaching: ask for a learning rate outside")
    probe = _Probe(model, forward, loss, reduction)
    pairs = find_pairs(model) if optimizer != "adamw" else []
    with observation_mode(model, gradients=True):
        device = model_device(model)
        every = [to_device(batch, device) for batch in itertools.islice(data, batches)]
        raise_together(None if every else ValueError("data is empty: it yielded no batch"))
        half = (len(every) + 1) // 2  # for the step; the rest for the loss, or of one alone both
        of_step, of_loss = every[:half], every[half:] or every
        start = probe.loss(of_loss)
        if not math.isfinite(start):
            raise ValueError(f"the loss is {start} before any step, but must be finite")
        direction = _direction(probe, optimizer, pairs, of_step)

        def loss_at(rate: float) -> float:
            with probe.moved(rate, direction):
                return probe.loss(of_loss)

        points, turn, reason = find_turn(loss_at, start)
    fall = 0.0 if start == 0 else 1.0 - min(points.values()) / abs(start)
    if reason is None and fall < _LEAST_FALL:
        reason = (
            f"the first step lowers the loss of other batches by {100 * fall:.1g} % only, and a line that flat does "
            "not speak for training (a new head, or a gradient that is mostly noise: larger or more batches help there)"
        )
    known = turn if reason is None else None
    low, rate, high = (None if known is None else known * part for part in SHARES[optimizer])
    return LearningRateAdvice(
        optimizer=optimizer,
        rate=rate,
        low=low,
        high=high,
        turn=turn,
        line=tuple(sorted(points.items())),
        batches=len(of_loss) if world_size() == 1 else sum(gather(len(of_loss))),
        forward_passes=probe.forward_passes,
        backward_passes=probe.backward_passes,
        seconds=time.perf_counter() - started,
        reason=reason,
    )
