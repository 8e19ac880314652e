"""The hooks of one pass and the sums they feed. Everything they touch is put back, whatever happens."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_kernels.ops._autocast import without_autocast
from lora_kernels.ops._rows import Selections, shared_selections
from lora_kernels.runtime.modes import is_sharded
from lora_kernels.statistics.masks import BatchWeights, UnassignedRowsError, align
from lora_kernels.statistics.options import CollectOptions
from lora_kernels.statistics.plan import Plan
from lora_kernels.statistics.sharing import InputSharing
from lora_kernels.statistics.sketches import stream_of
from lora_kernels.statistics.store import Target
from lora_kernels.statistics.sums import Accumulator, OutputGradients, add_gradients, needs_backward, new_sums
from lora_kernels.statistics.towers import Towers


class _Root(torch.autograd.Function):
    """Ties a tensor to an anchor: it becomes differentiable without a parameter. The anchor gets no gradient."""

    @staticmethod
    def forward(_ctx: Any, output: torch.Tensor, _anchor: torch.Tensor) -> torch.Tensor:
        return output.clone()  # a tensor of its own: the model may go on to change it in place

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] if ctx.needs_input_grad[0] else None, None


def _tensor_of(target: Target, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    x = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
    if x is None or x.dim() == 0 or x.shape[-1] != target.in_features or not x.is_floating_point():
        seen = "no tensor" if x is None else f"{x.dtype} {tuple(x.shape)}"
        raise ValueError(f"layer {target.name} was called with {seen}, expected (..., {target.in_features})")
    return x


def _routed(target: Target, x: torch.Tensor) -> tuple[torch.Size, torch.Tensor | None]:
    """The leading sizes of all rows, of which an expert (`adapters.experts.ExpertLayer`) gets those of some numbers."""
    rows: torch.Tensor | None = getattr(target.module, "rows", None)
    return (x.shape[:-1], None) if rows is None else (torch.Size([target.module.tokens]), rows)  # type: ignore[list-item]


class Observer:
    """One pass: hooks on the layers whose turn it is, and their sums."""

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        plan: Plan,
        number: int,
        options: CollectOptions,
        apart: Iterable[str] = (),
    ) -> None:
        """Prepare for pass `number` of a plan; layers in `apart` share no input."""
        self.options, self.plan = options, plan
        # Statistics and forms, by layer.
        self._inputs: dict[str, list[tuple[str, str]]] = {}
        self._outputs: dict[str, list[tuple[str, str]]] = {}
        for entry in plan.entries:
            chosen = self._outputs if needs_backward([entry.statistic]) else self._inputs
            for name in entry.layers if entry.number == number else ():
                chosen.setdefault(name, []).append((entry.statistic, entry.form))
        observed = {**self._inputs, **self._outputs}
        self.targets = {target.name: target for target in targets if target.name in observed}
        self.sharing = InputSharing(share=options.share_inputs, apart=apart)  # the input sums, by group
        self.outputs: dict[str, dict[str, Accumulator]] = {}  # the sums of output gradients, by layer and statistic
        self.weights = BatchWeights()  # of the current batch
        self._selections: Selections = {}
        # While this is false, the graph is built as ever (in step with other processes) but nothing is added.
        self.counting = True
        self._discarding = False
        self.forwarding = True  # false during the backward pass, where checkpointed layers run forward a second time
        self.unaligned: dict[str, str] = {}  # layers whose rows no mask fits, and why
        # Layers whose rows are not those of samples, where samples count alike, and why: their gradients are left out.
        self.unassigned: dict[str, str] = {}
        self.skipped: dict[str, int] = {}  # rows left out because they were not finite, by layer
        self._aligned_once = False
        self._hooks = contextlib.ExitStack()
        self._anchor = torch.zeros((), requires_grad=True)
        self._sharded = any(is_sharded(parameter) for parameter in model.parameters())
        self._model = model
        self._towers = Towers(model)
        reductions = (getattr(module, "_get_feature_vector_attention_mask", None) for module in model.modules())
        self._to_frames: Callable[[int, torch.Tensor], torch.Tensor] | None = next(filter(None, reductions), None)
        self._in_decoder = False
        self._encoder_storage: set[int] = set()
        self._sequences: dict[str, str] = {}

    @property
    def gradients(self) -> bool:
        """Whether this pass needs a backward pass."""
        return bool(self._outputs)

    def __enter__(self) -> Observer:
        with contextlib.ExitStack() as hooks:
            for name, target in self.targets.items():
                hooks.enter_context(target.module.register_forward_pre_hook(self._before(target), with_kwargs=True))
                if name in self._outputs:
                    hooks.enter_context(target.module.register_forward_hook(self._after(target), with_kwargs=True))
            if is_encoder_decoder(self._model):
                decoder = self._model.get_decoder()  # type: ignore[operator]
                hooks.enter_context(decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True))
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._towers.close()
        self._hooks.close()

    def begin(self, number: int, weights: BatchWeights, batch: Any) -> None:
        """Prepare for a batch, its number and the weights of its tokens."""
        self.weights, self._in_decoder = weights, False
        self._selections.clear()
        self.sharing.begin(number)
        if weights.tokens is not None:
            self._towers.begin(batch)

    def restart(self, apart: Iterable[str]) -> None:
        """Forget what was observed; layers in `apart` share no input from now on."""
        self.sharing = InputSharing(share=self.options.share_inputs, apart=apart)
        self.outputs.clear()
        self.skipped.clear()

    def _enter_decoder(self, _module: nn.Module, _args: Any, kwargs: Mapping[str, Any]) -> None:
        self._in_decoder = True  # until the batch ends: what follows (an output layer) has the decoder's rows
        states = kwargs.get("encoder_hidden_states")
        self._encoder_storage = {states.untyped_storage()._cdata} if isinstance(states, torch.Tensor) else set()

    def _sequence(self, name: str, x: torch.Tensor) -> str:
        """The sequence whose rows a layer reads: `tokens`, `decoder`, or `other` (of a tower, without a mask)."""
        if self.forwarding:  # a checkpointed layer runs again outside of its tower
            if self.weights.tokens is not None and self._towers.holds(x):
                self._sequences[name] = "other"
            else:
                decoder = self._in_decoder and x.untyped_storage()._cdata not in self._encoder_storage
                self._sequences[name] = "decoder" if decoder else "tokens"
        return self._sequences.get(name, "tokens")

    def _rows(self, name: str, x: torch.Tensor) -> torch.Tensor | None:
        tokens, rows = _routed(self.targets[name], x)
        sequence = self._sequence(name, x)
        mask = {"tokens": self.weights.tokens, "decoder": self.weights.decoder}.get(sequence)
        weight, fits = align(mask, tokens)
        if not fits and mask is not None and self._to_frames is not None and x.dim() == 3:
            # A mask of an audio model's samples, as that of its frames.
            weight, fits = align(self._to_frames(x.shape[1], mask), x.shape[:-1])
        if not fits:
            shape = None if mask is None else tuple(mask.shape)
            self.unaligned.setdefault(name, f"mask {shape} does not match input {tuple(x.shape)}: all rows counted")
        self._aligned_once |= weight is not None or sequence == "other"
        return weight if weight is None or rows is None else weight[rows]

    def _without_bad_rows(self, name: str, value: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor | None:
        if self.options.nonfinite != "skip":
            return weight
        finite = torch.isfinite(value).all(dim=-1)
        dropped = ~finite if weight is None else ~finite & (weight != 0)
        self.skipped[name] = self.skipped.get(name, 0) + int(dropped.sum())
        return finite if weight is None else weight * finite

    def _new(self, target: Target, statistic: str, form: str, device: torch.device) -> Any:
        sizes = {"out_features": target.out_features, "in_features": target.in_features}
        sizes |= {"size": self.plan.sketch_size, "seed": self.options.seed, "stream": stream_of(target.name)}
        return new_sums(statistic, form, sizes, device, self.options.dtype)

    def _before(self, target: Target) -> Callable[..., None]:
        name = target.name

        @without_autocast()
        def observe(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.counting or not self.forwarding:
                return
            x = _tensor_of(target, args, kwargs).detach()
            for statistic, form in self._inputs.get(name, ()):
                weight = self._rows(name, x)
                sums = self.sharing.assign(name, x, functools.partial(self._new, target, statistic, form, x.device))
                if sums is not None:
                    with shared_selections(self._selections):
                        sums.update(x, self._without_bad_rows(name, x, weight))

        return observe

    def _output_sums(self, target: Target, x: torch.Tensor, device: torch.device) -> tuple[dict[str, Accumulator], Any]:
        """The sums of a layer's output gradients and the factors of its rows; none if those are not of samples."""
        if target.name in self.unassigned:
            return {}, None
        sums = self.outputs.setdefault(target.name, {})
        for statistic, form in self._outputs[target.name]:
            if statistic not in sums:
                sums[statistic] = self._new(target, statistic, form, device)
        try:
            tokens, rows = _routed(target, x)
            factors = self.weights.row_factors(tokens)
            return sums, factors if factors is None or rows is None else factors[rows]
        except UnassignedRowsError as error:
            self.unassigned[target.name] = str(error)
            for part in sums.values():
                part.clear()  # of earlier calls, too
            return {}, None

    def _after(self, target: Target) -> Callable[..., torch.Tensor | None]:
        def tap(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> torch.Tensor | None:
            if not isinstance(output, torch.Tensor):
                raise TypeError(f"layer {target.name} returned {type(output).__name__}, expected one tensor")
            x = _tensor_of(target, args, kwargs).detach()
            sums: dict[str, Accumulator] = {}
            weight = factors = None
            if self.counting:
                weight = self._rows(target.name, x)
                sums, factors = self._output_sums(target, x, output.device)
            if sums and self.forwarding:
                rows = x.shape[:-1].numel() if weight is None else weight.sum(dtype=torch.float64)
                for part in sums.values():
                    part.count += rows
            if not torch.is_grad_enabled():  # the first forward of a (reentrant) checkpoint: the second one has a graph
                return None
            if self._sharded or not output.requires_grad:
                output = _Root.apply(output, self._anchor)  # type: ignore[no-untyped-call]
                assert isinstance(output, torch.Tensor)
            if sums:
                reads_input = any(part.reads_input for part in sums.values())
                held = [x if reads_input else None, x._version, weight, factors]
                output.register_hook(functools.partial(self._receive, target.name, sums, held))  # type: ignore[no-untyped-call]
            return output

        return tap

    @without_autocast()
    def _receive(self, name: str, sums: dict[str, Accumulator], held: list[Any], g: torch.Tensor | None) -> None:
        # An undefined gradient: nothing downstream depends on this output.
        if self._discarding or g is None or name in self.unassigned:
            return
        x, version, weight, factors = held
        held.clear()  # frees the activation as soon as it has served
        if x is not None and x._version != version:
            raise RuntimeError(
                f"the input of layer {name} was changed in place after the layer had read it: its weight gradient "
                "cannot be formed"
            )
        g = g.detach()
        if self.options.nonfinite == "skip":
            # A row sum in float32 is finite if and only if the row is.
            row_sums = [value.sum(-1, dtype=torch.float32) for value in (g, x) if value is not None]
            kept = self._without_bad_rows(name, torch.stack(row_sums, dim=-1), weight)
            assert kept is not None  # skip
            counted = row_sums[0].numel() if weight is None else weight.sum(dtype=torch.float64)
            for part in sums.values():
                part.count += kept.sum(dtype=torch.float64) - counted
            finite = torch.isfinite(torch.stack(row_sums, dim=-1)).all(dim=-1)
            weight, factors = kept, finite if factors is None else factors * finite
        with shared_selections(self._selections):
            add_gradients(sums, OutputGradients(g, x, weight, factors))

    def backward(self, loss: torch.Tensor, *, discard: bool = False) -> None:
        """Send the gradient of a sum over items through the graph; `discard` adds nothing (in step with others)."""
        self.forwarding, self._discarding = False, discard
        try:
            if self._sharded:
                # Shards keep their `requires_grad`: only what leads to the anchor is computed, and every layer does.
                torch.autograd.grad(loss, [self._anchor], allow_unused=True)
            else:  # no parameter requires a gradient; checkpoints of every kind work
                loss.backward()  # type: ignore[no-untyped-call]
        finally:
            self.forwarding, self._discarding = True, False

    def check_loss(self, loss: torch.Tensor, batch: int) -> None:
        """Refuse a loss that does not depend on an observed layer, or is not finite."""
        if not loss.requires_grad:
            raise ValueError("the loss does not depend on any observed layer: no gradient can reach one")
        if self.options.nonfinite == "raise" and not bool(torch.isfinite(loss.detach())):
            self.check_inputs(batch)
            raise ValueError(f"the loss is {float(loss.detach())} in batch {batch}")

    def check_inputs(self, batch: int) -> None:
        """Refuse input sums that are not finite (one wait per device)."""
        sums = [(", ".join(group.members), group.sums.total) for group in self.sharing.distinct()]
        _refuse_nonfinite(sums, "input", f"in batch {batch}")

    def check(self, batch: int) -> None:
        """After a batch: refuse a mask that fits no layer, and sums that are not finite."""
        mask = self.weights.tokens
        if mask is not None and not self._aligned_once:
            raise ValueError(
                f"the mask has shape {tuple(mask.shape)}, which matches the input of no observed layer; "
                "pass mask=None or a mask function"
            )
        self.check_inputs(batch)
        # Weight gradients are read once, at the end: reading them after every batch would cost as much memory traffic
        # as adding to them.
        vectors = [(name, getattr(part, part.vector)) for name, part in self.output_sums() if part.vector]
        _refuse_nonfinite(vectors, "gradient", f"in batch {batch}")

    def check_all(self) -> None:
        """At the end of a pass: refuse sums of gradients that are not finite."""
        values = [(name, getattr(part, part.vector or part.main)) for name, part in self.output_sums()]
        _refuse_nonfinite(values, "gradient", "in some batch")

    def output_sums(self) -> list[tuple[str, Accumulator]]:
        """All sums of output gradients, with their layers."""
        return [(name, part) for name, sums in self.outputs.items() for part in sums.values()]


def _refuse_nonfinite(sums: Sequence[tuple[str, torch.Tensor]], what: str, when: str) -> None:
    by_device: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    for name, value in sums:
        by_device.setdefault(value.device, []).append((name, torch.isfinite(value.sum(dtype=torch.float64))))
    for flags in by_device.values():
        for (name, _), good in zip(flags, torch.stack([flag for _, flag in flags]).tolist(), strict=True):
            if not good:
                raise ValueError(
                    f'non-finite {what} (NaN or infinity) in layer {name} {when}; nonfinite="skip" leaves such rows out'
                )


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a transformers model has an encoder and a decoder."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and hasattr(model, "get_decoder")
