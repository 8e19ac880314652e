"""The optimizer: groups and state as torch's own optimizers have them, steps in batches of pairs of one shape."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim import Optimizer
from typing_extensions import TypedDict

from lora_kernels._checks import check_choice, check_range, check_tensor
from lora_kernels.ops._autocast import without_autocast
from lora_kernels.ops.lora_pro_adam.op import adam_pairs
from lora_kernels.runtime.modes import is_sharded, local
from lora_kernels.training.lora_pro.adjustment import Adjustment
from lora_kernels.training.lora_pro.buckets import Bucket, Layout, Scratch, draw_seed, mix, working_dtype, wrap
from lora_kernels.training.lora_pro.update import Entry, Rounding, adamw_, descend_

Mode = Literal["efficient", "full"]
MODES = ("efficient", "full")
RoundingMode = Literal["nearest", "stochastic"]
_MOMENTS = ("exp_avg", "exp_avg_sq")
_WAVE = {"cpu": 2**24, "gpu": 2**27}  # elements of factors that are copied side by side at once

Scaling = float | Callable[[], float]
PairEntry = tuple[torch.Tensor, torch.Tensor, Scaling] | tuple[torch.Tensor, torch.Tensor, Scaling, int]
Place = tuple[int, int]  # number of the group, and of the parameter in it


class LoraProOptions(TypedDict, total=False):
    """Arguments of `LoraPro`, as keywords."""

    mode: Mode
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    damping: float
    state_dtype: torch.dtype | None
    rounding: RoundingMode


@dataclass(frozen=True)
class Pair:
    """A pair, by position in the optimizer's groups: wrappers (accelerate with FSDP2) replace the parameters."""

    a: Place
    b: Place
    scaling: Scaling  # s, or a function that says what it is now
    experts: int = 1

    def current_scaling(self, name: str) -> float:
        """The scaling as it is now, finite and not zero."""
        value = float(self.scaling() if callable(self.scaling) else self.scaling)
        if value == 0.0 or not math.isfinite(value):
            raise ValueError(f"scaling of {name} is {value!r}, but must be finite and not zero")
        return value


def check_options(group: dict[str, Any]) -> None:
    """Check lr, betas, eps and weight_decay of a parameter group."""
    lr = group["lr"]
    if isinstance(lr, torch.Tensor):
        check_tensor("lr", lr, numbers=True)
        if lr.numel() != 1:
            raise ValueError(f"lr has shape {tuple(lr.shape)}, but must be a number or a tensor of one element")
        lr = float(lr)
    check_range("lr", lr, low=0.0, high=sys.float_info.max)
    betas = group["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"betas is {betas!r}, but must be two numbers")
    for index, beta in enumerate(betas):
        check_range(f"betas[{index}]", beta, low=0.0, high=1.0)
        if beta == 1.0:
            raise ValueError(f"betas[{index}] is {beta!r}, but must be below 1")
    check_range("eps", group["eps"], low=0.0, high=sys.float_info.max)
    check_range("weight_decay", group["weight_decay"], low=0.0, high=sys.float_info.max)


def per_pair(name: str, value: Any, count: int) -> list[Any]:
    """One value per pair, from one value or a sequence."""
    values = list(value) if isinstance(value, Sequence) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries, but must be a number or one per pair ({count})")
    return values


def check_gradient(name: str, gradient: torch.Tensor) -> None:
    """Check that a gradient is dense."""
    if gradient.layout != torch.strided:
        raise ValueError(f"the gradient of {name} has layout {gradient.layout}, but LoraPro needs dense gradients")


class LoraPro(Optimizer):
    """LoRA-Pro (arXiv 2407.18242): gradients of LoRA pairs adjusted to follow the gradient of the full weight.

    A step moves `s B A` by `E = s B dA + s dB A`, to first order; the adjusted `(dA, dB)` bring E closest to the
    gradient of the full weight. `mode="efficient"` runs AdamW on them. `mode="full"` is the paper's: Adam's moments are
    those of E, 2 m n numbers per pair, and the direction they give is projected back onto the factors.

    Parameters in no pair get AdamW. Arithmetic is in float32 (float64 for float64 parameters) whatever the parameters'
    dtype, and results are rounded to it; states are float32 (float64), keyed by parameter (`step`, `exp_avg`,
    `exp_avg_sq`; in `full` mode those of B are `(m, n)`, of experts `(m, experts n)`, and A has `step` alone). Weight
    decay is decoupled. `step` uses the gradients as they are: accumulation, unscaling and clipping come before, and so
    act on the gradients of A and B, not on the adjusted ones. A pair without gradients is skipped.

    On several processes: under DDP all processes take equal steps. Under FSDP2 (`fully_shard`) factors are sharded by
    rows: the rows of A are gathered, those of B and of the moments of the full weight stay local. In `full` mode with
    bfloat16 moments all processes must have the same seed: rank 0's is broadcast if the optimizer is created after
    `init_process_group`. FSDP1 and DeepSpeed's optimizers flatten parameters, and cannot hold pairs.

    Args:
        params: parameters, or groups. A group is `{"params": [...]}`, or `{"pairs": [(A, B), ...], "scaling": s}` with
            A `(r, n)` and B `(m, r)` and the weight `W + s B A`; its scaling is a number, a function without arguments
            that is called at every step, or one of these per pair. Each group may have its own lr, betas, eps and
            weight_decay (a pair uses betas and eps of B's group). With `"experts"`, a number or one per pair, A
            `(experts r, n)` (by expert and rank) and B `(m, r experts)` (by rank and expert) hold a pair for each
            expert, as PEFT's `target_parameters` have them.
        lr: learning rate.
        pairs: `(A, B, scaling)` or `(A, B, scaling, experts)` for parameters that are given in ordinary groups, in any
            of them.
        mode: `efficient` or `full`.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment; above 0 in `full` mode.
        weight_decay: decoupled, of A and B themselves.
        damping: added to the eigenvalues of `B^T B` and `A A^T` before they are inverted.
        state_dtype: of the moments in `full` mode: `None`, float32 (float64 for float64 parameters); or
            `torch.bfloat16` with stochastic rounding, seeded from torch's default generator.
        rounding: of bfloat16 parameters after a step: `nearest`, which leaves them as they are where the step is below
            half of their precision (a 256th to a 512th of a number), or `stochastic`, which keeps the mean; seeded like
            bfloat16 moments.

    Raises:
        TypeError: on a wrong type or dtype.
        ValueError: on a number out of range, shapes or devices that do not match, or a parameter given twice.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor,
        *,
        pairs: Sequence[PairEntry] = (),
        mode: Mode = "efficient",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        damping: float = 1e-8,
        state_dtype: torch.dtype | None = None,
        rounding: RoundingMode = "nearest",
    ) -> None:
        check_choice("mode", mode, MODES)
        check_choice("state_dtype", state_dtype, (None, torch.bfloat16))
        if state_dtype == torch.bfloat16 and mode != "full":
            raise ValueError('state_dtype is torch.bfloat16, which needs mode="full": efficient states are small')
        check_choice("rounding", rounding, ("nearest", "stochastic"))
        check_range("damping", damping, low=0.0, high=1e30)
        self.mode, self.damping, self.state_dtype, self.rounding = mode, damping, state_dtype, rounding
        self._pairs: list[Pair] = []
        self._scalings: dict[tuple[Any, ...], torch.Tensor] = {}
        self._scratch = Scratch()
        seed = draw_seed() if state_dtype == torch.bfloat16 or rounding == "stochastic" else 0
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed}
        if rounding == "stochastic":
            defaults["steps"] = 0  # of the optimizer; saved with the groups
        super().__init__(params, defaults)
        self._locate(pairs)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles."""
        own = ("mode", "damping", "state_dtype", "rounding", "_pairs")
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For copies and pickles, and of `load_state_dict`."""
        super().__setstate__(state)
        self.__dict__.setdefault("_scalings", {})
        self.__dict__.setdefault("_scratch", Scratch())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters or of pairs, as in the constructor, with its errors."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        group = dict(param_group)
        check_options({**self.defaults, **group})
        if self.mode == "full" and {**self.defaults, **group}["eps"] == 0:  # 0 / 0 before the first gradient
            raise ValueError('eps is 0, but must be above 0 with mode="full"')
        if "pairs" not in group:
            for name in ("scaling", "experts"):
                if name in group:
                    raise ValueError(f"{name} belongs to a group with pairs, but this one has params")
            super().add_param_group(group)
            return
        if "params" in group:
            raise ValueError("a group has pairs or params, but this one has both")
        if "scaling" not in group:
            raise ValueError("a group with pairs needs its scaling")
        pairs, number = [tuple(pair) for pair in group.pop("pairs")], len(self.param_groups)
        scalings = per_pair("scaling", group.pop("scaling"), len(pairs))
        counts = per_pair("experts", group.pop("experts", 1), len(pairs))
        for index, (pair, scaling, count) in enumerate(zip(pairs, scalings, counts, strict=True)):
            if len(pair) != 2:
                raise ValueError(f"pairs[{index}] has {len(pair)} entries, but must be (A, B)")
            self._check_pair(f"pairs[{index}]", *pair, scaling, count)
        group["params"] = [parameter for pair in pairs for parameter in pair]
        if len({id(parameter) for parameter in group["params"]}) != len(group["params"]):
            raise ValueError("pairs holds a parameter twice")
        super().add_param_group(group)
        self._pairs += [
            Pair((number, 2 * index), (number, 2 * index + 1), scaling, count)
            for index, (scaling, count) in enumerate(zip(scalings, counts, strict=True))
        ]

    def _check_pair(self, name: str, a: Any, b: Any, scaling: Any, experts: Any = 1) -> None:
        """Check that A `(experts r, n)` and B `(m, r experts)` can be factors of a pair, or of a pair per expert."""
        check_range("experts", experts, low=1, integer=True)
        check_tensor(f"A of {name}", a, shape=(None, None))
        check_tensor(f"B of {name}", b, shape=(None, a.shape[0]), dtypes=(a.dtype,), device=a.device)
        if a is b:
            raise ValueError(f"A and B of {name} are the same parameter, but must be two")
        if min(*a.shape, *b.shape) == 0:
            raise ValueError(f"{name} has the shapes {tuple(a.shape)} and {tuple(b.shape)}, but no size may be 0")
        if a.shape[0] % experts:
            raise ValueError(f"A of {name} has {a.shape[0]} rows, but must have as many for each of {experts} experts")
        if is_sharded(a) != is_sharded(b) or Layout.of(a) != Layout.of(b):
            raise ValueError(f"A and B of {name} must be sharded alike, or both be whole")
        if not callable(scaling):
            check_range("scaling", scaling, low=-sys.float_info.max, high=sys.float_info.max)
            if scaling == 0:
                raise ValueError("scaling is 0, but must not be: such a pair never learns")
        if self.state_dtype == torch.bfloat16 and a.dtype == torch.float64:
            raise ValueError(f"state_dtype is torch.bfloat16, but {name} is of float64: its moments are float64")

    def _locate(self, pairs: Sequence[PairEntry]) -> None:
        """Find the parameters of pairs in the groups."""
        places = {
            id(parameter): (number, index)
            for number, group in enumerate(self.param_groups)
            for index, parameter in enumerate(group["params"])
        }
        paired = {place for pair in self._pairs for place in (pair.a, pair.b)}
        for index, (a, b, scaling, *experts) in enumerate(pairs):
            name, pair_places = f"pairs[{index}]", []
            self._check_pair(name, a, b, scaling, *experts)
            for parameter, factor in ((a, "A"), (b, "B")):
                if (place := places.get(id(parameter))) is None:
                    raise ValueError(f"{factor} of {name} is in no parameter group")
                if place in paired:
                    raise ValueError(f"{factor} of {name} is in two pairs")
                paired.add(place)
                pair_places.append(place)
            self._pairs.append(Pair(pair_places[0], pair_places[1], scaling, *experts))

    def _at(self, place: Place) -> torch.Tensor:
        parameter: torch.Tensor = self.param_groups[place[0]]["params"][place[1]]
        return parameter

    def _moment_dtype(self, parameter: torch.Tensor, *, full: bool) -> torch.dtype:
        bfloat16 = full and self.state_dtype == torch.bfloat16
        return torch.bfloat16 if bfloat16 else working_dtype(parameter.dtype)

    def _state_of(self, parameter: torch.Tensor, columns: int | None = None) -> dict[str, Any]:
        """State of a parameter, created if missing; in `full` mode `columns` is n for B, and 0 for A (no moments)."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            dtype = self._moment_dtype(parameter, full=columns is not None)
            state["step"] = torch.zeros((), dtype=torch.float32)
            part = local(parameter)
            for key in _MOMENTS if columns != 0 else ():
                if columns is None:
                    zeros = torch.zeros_like(part, dtype=dtype)
                else:
                    zeros = torch.zeros(part.shape[0], columns, dtype=dtype, device=part.device)
                state[key] = zeros if part is parameter else wrap(zeros, parameter)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, to the bit; a ValueError if groups, their sizes, or the mode differ."""
        # torch casts every floating-point state to the parameter's dtype, which would round the moments of bfloat16
        # parameters: they are restored as they were saved.
        loaded: dict[str, Any] = {}

        def check(_: Optimizer, state: dict[str, Any]) -> None:
            loaded.update(state)
            self._check_saved(state)

        with (
            self.register_load_state_dict_pre_hook(check),  # type: ignore[arg-type]
            self.register_load_state_dict_post_hook(lambda _: self._restore_state(loaded), prepend=True),
        ):
            super().load_state_dict(state_dict)

    def _saved(self, saved: dict[str, Any]) -> Iterator[tuple[torch.Tensor, dict[str, Any], Pair | None]]:
        # Each parameter that is in both, its saved state, and, of B in `full` mode, its pair.
        full = {pair.b: pair for pair in self._pairs} if self.mode == "full" else {}
        for number, (group, own) in enumerate(zip(saved["param_groups"], self.param_groups, strict=False)):
            for index, (key, parameter) in enumerate(zip(group["params"], own["params"], strict=False)):
                yield parameter, saved["state"].get(key, {}), full.get((number, index))

    def _check_saved(self, saved: dict[str, Any]) -> None:
        for parameter, state, pair in self._saved(saved):
            moment, expected = state.get("exp_avg"), tuple(parameter.shape)
            if pair is not None:
                expected = (parameter.shape[0], pair.experts * self._at(pair.a).shape[1])
            if isinstance(moment, torch.Tensor) and tuple(moment.shape) != expected:
                raise ValueError(
                    f"state_dict holds moments of shape {tuple(moment.shape)} where mode={self.mode!r} has {expected}: "
                    "it was saved in another mode, or for other parameters"
                )

    def _restore_state(self, saved: dict[str, Any]) -> None:
        for parameter, state, pair in self._saved(saved):
            for name, value in state.items():
                if name == "step":
                    value = torch.as_tensor(value, dtype=torch.float32, device="cpu")
                elif isinstance(value, torch.Tensor):
                    value = value.to(parameter.device, self._moment_dtype(parameter, full=pair is not None))
                    if parameter.is_contiguous():  # torch's fused CPU kernels ignore strides
                        value = value.contiguous()
                self.state[parameter][name] = value

    @torch.no_grad()
    @without_autocast()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take a step.

        Args:
            closure: computes the loss and the gradients again.

        Raises:
            ValueError: if one factor of a pair has a gradient and the other has none, a gradient is sparse, the
                factors of a pair are not finite, or its scaling is zero or not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rounding = self._next_rounding()
        for wave in self._waves():
            self._step_pairs(wave, rounding)
        adamw_(self._plain_entries(), self.param_groups, rounding)
        return loss

    def _next_rounding(self) -> Rounding | None:
        if self.rounding != "stochastic" or not self.param_groups:
            return None
        first = self.param_groups[0]
        first["steps"] += 1
        return Rounding(mix(mix(first["seed"], len(self._pairs)), first["steps"]))

    def _plain_entries(self) -> list[Entry]:
        paired = {place for pair in self._pairs for place in (pair.a, pair.b)}
        entries = []
        for number, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                if (number, index) in paired or parameter.grad is None:
                    continue
                check_gradient(f"parameter {index} of group {number}", parameter.grad)
                gradient = local(parameter.grad).to(working_dtype(parameter.dtype))
                entries.append(Entry(number, local(parameter), gradient, self._state_of(parameter)))
        return entries

    def _waves(self) -> list[list[Bucket]]:
        """Pairs with gradients, in buckets of one shape, dtype, device and layout; a wave of one rank bounds memory."""
        kinds: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for index, pair in enumerate(self._pairs):
            a, b = self._at(pair.a), self._at(pair.b)
            missing = [name for name, factor in (("A", a), ("B", b)) if factor.grad is None]
            if len(missing) == 2:
                continue
            if missing:
                raise ValueError(
                    f"pair {index} has a gradient for one factor only ({missing[0]} has none): a pair is trained as "
                    "one; give a factor whose partner is frozen to an ordinary group"
                )
            for name, parameter in (("A", a), ("B", b)):
                check_gradient(f"{name} of pair {index}", parameter.grad)  # type: ignore[arg-type]
            kinds[a.shape, b.shape, pair.experts, a.dtype, a.device, Layout.of(b)].append(index)
        waves: list[list[Bucket]] = []
        open_waves: dict[tuple[Any, ...], tuple[list[Bucket], int]] = {}  # with the elements that are still free
        for ((height, n), (m, _), experts, dtype, device, rows), indices in kinds.items():
            key = (height // experts, working_dtype(dtype), device)
            limit = _WAVE["cpu" if device.type == "cpu" else "gpu"]
            size = max(1, limit // (height * (m + n)))
            for low in range(0, len(indices), size):
                part = indices[low : low + size]
                scaling = [self._pairs[index].current_scaling(f"pair {index}") for index in part]
                parameters = [(self._at(self._pairs[index].a), self._at(self._pairs[index].b)) for index in part]
                needed = len(part) * height * (m + n)
                wave, room = open_waves.get(key, ([], 0))
                if needed > room:
                    wave, room = [], limit
                    waves.append(wave)
                wave.append(Bucket(part, scaling, parameters, rows, experts))
                open_waves[key] = wave, room - needed
        return waves

    def _step_pairs(self, wave: list[Bucket], rounding: Rounding | None) -> None:
        scaling = tuple(value for bucket in wave for _, value in bucket.matrices)
        device = wave[0].parameters[0][0].device
        if (scaling, device) not in self._scalings:
            if len(self._scalings) > 64:  # scalings that change at every step
                self._scalings.clear()
            self._scalings[scaling, device] = torch.tensor(scaling, dtype=torch.float64, device=device)
        for slot, bucket in enumerate(wave):
            bucket.fill(self._scratch, slot)
        adjust = Adjustment(wave, self._scalings[scaling, device], self.damping)
        if self.mode == "full":
            adjust(cross=False)
            for bucket in wave:
                self._project(bucket)
        adjust(cross=True)
        entries = [entry for bucket in wave for entry in self._entries(bucket)]
        (descend_ if self.mode == "full" else adamw_)(entries, self.param_groups, rounding)

    def _project(self, bucket: Bucket) -> None:
        """Replace the raw gradients by those of Adam's direction of the full weight."""
        n, m = bucket.a.shape[2], bucket.parameters[0][1].shape[0]
        own, count = bucket.rows.own(m), bucket.experts
        runs: list[tuple[dict[str, Any], list[tuple[torch.Tensor, torch.Tensor]], list[int]]] = []
        for index, scaling, (a, b) in zip(bucket.indices, bucket.scaling, bucket.parameters, strict=True):
            group, state = self.param_groups[self._pairs[index].b[0]], self._state_of(b, count * n)
            for factor_state in (self._state_of(a, 0), state):  # (torch.distributed.checkpoint wants a state for all)
                factor_state["step"] += 1
            mean, square = (local(state[key]).view(own.stop - own.start, count, n).transpose(0, 1) for key in _MOMENTS)
            numbers = {"scaling": scaling, "betas": tuple(group["betas"]), "eps": group["eps"]}
            numbers |= {"step": int(state["step"]), "row_offset": own.start, "row_step": m}
            if not runs or runs[-1][0] != numbers:  # neighbours with the same numbers are one call
                runs.append((numbers, [], []))
            runs[-1][1].append((mean, square))
            runs[-1][2].append(mix(group["seed"], index))
        first = 0
        for numbers, moments, seeds in runs:
            part = slice(first, first + len(moments) * count)
            factors = bucket.a[part], bucket.b[part], bucket.out_a[part], bucket.out_b[part]
            results = bucket.grad_a[part], bucket.grad_b[part]
            adam_pairs(moments, factors, results, numbers, seeds if self.state_dtype == torch.bfloat16 else None)
            first = part.stop
        bucket.rows.add_up(bucket.grad_a)
        bucket.contract()

    def _entries(self, bucket: Bucket) -> list[Entry]:
        entries = []
        for index, parameters, gradients in zip(bucket.indices, bucket.parameters, bucket.adjusted(), strict=True):
            pair = self._pairs[index]
            for place, parameter, gradient in zip((pair.a, pair.b), parameters, gradients, strict=True):
                state = self._state_of(parameter) if self.mode == "efficient" else {}
                entries.append(Entry(place[0], local(parameter), gradient, state))
        return entries
