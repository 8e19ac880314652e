"""Checking and timing the forms of one product.

The numbers of every form are checked first, against float64 and beside plain torch. Then all are timed in turn, so that
drift of the machine meets all alike, on inputs that the caches have forgotten (GPU).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from lora_kernels.ops._dropout import Mask
from lora_kernels.ops._op import isolated, relative_error
from lora_kernels.ops._tiles import capability_of
from lora_kernels.ops.lora_linear import forms, table
from lora_kernels.ops.lora_linear.config import candidates, is_aligned
from lora_kernels.ops.lora_linear.forms import DEFAULT, Choice, Term
from lora_kernels.ops.lora_linear.op import layer
from lora_kernels.ops.lora_linear.table import Key, Record

FLOOR = "mm"  # the library's product alone
# The default stays unless another form is this much faster: less than that is noise.
MARGIN = 0.98
# Error against float64, over that of plain torch; and what float32 sums in another order may differ by.
LIMIT, ROUNDING = 2.0, 5e-7
# Rows that are checked: blocks all over the matrix.
_BLOCKS, _BLOCK = 8, 32
# Bytes written before a timed call, and how often: more than any second-level cache, and about 1 ms, in which the
# host queues the call's kernels (40 to 90 us); else a gap of the host's would be timed.
_FLUSHED, _FLUSHES = 2**28, 12
_THRESHOLD = round(0.1 * 65536)


@dataclass(frozen=True)
class Measurement:
    """One product of one shape."""

    key: Key
    tokens: int  # rows that were measured
    rank: int  # of the low-rank term
    seconds: Mapping[str, float]  # medians by candidate, and of the product alone (`mm`)
    errors: Mapping[str, float]  # relative, against float64, by candidate, and of plain torch (`torch`)
    refused: Mapping[str, str]  # candidates that cannot run, or gave wrong numbers, and why
    choice: Choice  # what is written down

    @property
    def wrong(self) -> tuple[str, ...]:
        """Candidates whose numbers are wrong."""
        return tuple(name for name in self.refused if name in self.errors)

    @property
    def flops(self) -> float:
        """Multiplications and additions of the product and the low-rank term."""
        return 2.0 * self.tokens * (self.key.n * self.key.m + self.rank * self._columns)

    @property
    def bytes(self) -> float:
        """What has to be read and written at least."""
        n, m, tokens = self.key.n, self.key.m, self.tokens
        numbers = tokens * (n + m) + n * m + self.rank * (tokens + self._columns)
        return float(numbers * getattr(torch, self.key.dtype).itemsize)

    @property
    def _columns(self) -> int:
        return self.key.m if self.key.product == "forward" else self.key.n

    def record(self) -> Record:
        """As it is written down."""
        config = self.choice.config
        name = None if config is None else config.name
        return Record(self.key, self.choice.form, name, dict(self.seconds), table.versions())


@dataclass(frozen=True)
class _Problem:
    """A product with its operands."""

    left: torch.Tensor
    right: torch.Tensor
    term: Term
    out: torch.Tensor
    backend: str

    @staticmethod
    def draw(key: Key, tokens: int, rank: int, device: torch.device, dtype: torch.dtype) -> _Problem:
        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=device, dtype=torch.float32).to(dtype)

        generator = torch.Generator(device).manual_seed(0)
        weight, mask = normal(key.m, key.n).mul_(key.n**-0.5), None
        backend = layer.choose("auto", device, dtype, key.dropout, rank)
        if key.product == "forward":
            left, right, b = normal(tokens, key.n), weight.mT, normal(key.m, rank).mT
        else:
            left, right, b = normal(tokens, key.m), weight, normal(rank, key.n)
        if key.dropout:
            mask = Mask(_THRESHOLD, torch.full((1,), 1234, dtype=torch.int64, device=device), 5)
        out = left.new_empty(tokens, right.shape[1])
        if mask is not None and backend == "triton":  # in a layer, the gradient of A has written its bits
            from lora_kernels.ops.skinny.kernel import bits_of  # noqa: PLC0415  (Triton may be missing)

            mask = mask._replace(bits=bits_of(mask, out)[0])
        return _Problem(left, right, Term(normal(tokens, rank).mul_(rank**-0.5), b, mask), out, backend)

    def run(self, choice: Choice) -> None:
        forms.combine(self.out, self.left, self.right, (self.term,), backend=self.backend, choice=choice)

    @property
    def parts(self) -> list[slice]:
        """Blocks of rows that are checked, the first and the last among them."""
        tokens = self.left.shape[0]
        last = max(tokens - _BLOCK, 0)
        starts = sorted({last * i // (_BLOCKS - 1) for i in range(_BLOCKS)})
        return [slice(start, min(start + _BLOCK, tokens)) for start in starts]

    def reference(self, dtype: torch.dtype) -> torch.Tensor:
        """Those rows by plain torch, in a dtype."""
        (t, b, mask), rows = self.term, []
        right, factor = self.right.to(dtype), b.to(dtype)
        for part in self.parts:
            delta = t[part].to(dtype) @ factor
            if mask is not None:
                delta = torch.where(mask.keep(part, delta.shape[1], t.device), delta, 0) * mask.factor
            rows.append(self.left[part].to(dtype) @ right + delta)
        return torch.cat(rows)


def _seconds(call: Callable[[], object], flushed: torch.Tensor | None) -> float:
    if flushed is None:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    for _ in range(_FLUSHES):
        flushed.zero_()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def _interleaved(calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds by name; the order turns, and one round before is not counted."""
    flushed = torch.empty(_FLUSHED, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            elapsed = _seconds(calls[name], flushed)
            if number:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def _candidates(problem: _Problem) -> tuple[list[Choice], dict[str, str]]:
    device, dtype = problem.out.device, problem.out.dtype
    choices = [Choice("expand_first"), Choice("expand_add")]
    reason = forms.gemm_refuses(device, dtype, problem.backend)
    if reason is not None:
        return choices, {"gemm": reason}
    aligned = is_aligned(problem.out, problem.left, problem.right)
    configs = candidates(dtype, aligned=aligned, capability=capability_of(device))
    return [*choices, *(Choice("gemm", config) for config in configs)], {}


def fastest(seconds: Mapping[str, float], choices: Sequence[Choice]) -> Choice:
    """The quickest of the choices, which all gave right numbers; the default unless beaten by more than noise."""
    best = min(choices, key=lambda choice: seconds[choice.name])
    default = next(choice for choice in choices if choice.form == DEFAULT)
    return best if seconds[best.name] < MARGIN * seconds[default.name] else default


def measure(
    key: Key, *, tokens: int, rank: int, device: torch.device, dtype: torch.dtype, rounds: int = 20
) -> Measurement:
    """Check all forms of one product and time them; raises where the default form fails or gives wrong numbers."""
    problem = _Problem.draw(key, tokens, rank, device, dtype)
    with isolated(problem.out.device):
        choices, refused = _candidates(problem)
        truth = problem.reference(torch.float64)
        errors = {"torch": relative_error([problem.reference(problem.out.dtype)], [truth])}
        bound = LIMIT * errors["torch"] + ROUNDING
        right = []
        for choice in choices:
            try:
                problem.out.fill_(float("nan"))
                problem.run(choice)
                error = relative_error([torch.cat([problem.out[part] for part in problem.parts])], [truth])
            except Exception as failure:  # a compiler raises anything; whatever it is, this form does not run here
                if choice.form == DEFAULT:
                    raise
                refused[choice.name] = " ".join(f"failed: {type(failure).__name__}: {failure}".split())[:200]
                continue
            errors[choice.name] = error
            if error <= bound:
                right.append(choice)
            else:
                refused[choice.name] = f"WRONG on {key.chip}: error {error:.1e} against float64, allowed {bound:.1e}"
        if all(choice.form != DEFAULT for choice in right):
            raise RuntimeError(f"the form {DEFAULT!r}: {refused[DEFAULT]}")
        calls: dict[str, Callable[[], object]] = {choice.name: partial(problem.run, choice) for choice in right}
        calls[FLOOR] = lambda: torch.mm(problem.left, problem.right, out=problem.out)
        seconds = _interleaved(calls, rounds, problem.out.device)
        return Measurement(key, problem.out.shape[0], rank, seconds, errors, refused, fastest(seconds, right))
