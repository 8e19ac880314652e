"""One pass over data with hooks on the observed layers. Everything it touches is put back, whatever happens."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lora_kernels.ops._checks import check_choice, check_range
from lora_kernels.statistics.masks import Mask, align, check_mask, token_weights
from lora_kernels.statistics.sharing import InputSharing
from lora_kernels.statistics.store import LayerStatistics, Statistics, Target

Forward = Callable[[nn.Module, Any], Any]


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: a mapping as keywords, a tuple or list as positions, anything else as one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a (nested) batch; other values pass through."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [to_device(value, device) for value in batch]
    return batch


def model_device(model: nn.Module) -> torch.device:
    """The device that holds the model's first parameter.

    Args:
        model: any module.

    Returns:
        That device; the CPU if there are no parameters.

    Raises:
        ValueError: if base weights are on the meta device.
    """
    devices = [parameter.device for parameter in model.parameters() if parameter.device.type != "meta"]
    if devices:
        return devices[0]
    if any(True for _ in model.parameters()):
        raise ValueError("model is on the meta device: load its weights before collecting statistics")
    return torch.device("cpu")


@contextlib.contextmanager
def observation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; training flags and random states are restored at the end.

    Args:
        model: the model to observe.

    Yields:
        Nothing.
    """
    training = {module: module.training for module in model.modules()}
    started = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = [torch.cuda.current_device()] if started else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


class _Recorder:
    """The hooks and the sums they feed."""

    def __init__(self, targets: Sequence[Target], sharing: InputSharing, dtype: torch.dtype, nonfinite: str) -> None:
        self.targets = {target.name: target for target in targets}
        self.sharing = sharing
        self.dtype = dtype
        self.nonfinite = nonfinite
        self.weights: torch.Tensor | None = None
        self.unaligned: dict[str, str] = {}
        self.aligned_once = False
        self.skipped: dict[str, int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> _Recorder:
        try:
            for target in self.targets.values():
                hook = self._hook(target)
                self._handles.append(target.module.register_forward_pre_hook(hook, with_kwargs=True))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, target: Target) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def observe(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            candidates = [*args, *kwargs.values()]
            x = next((each for each in candidates if isinstance(each, torch.Tensor)), None)
            if x is None or x.dim() == 0 or x.shape[-1] != target.in_features or not x.is_floating_point():
                seen = "no tensor" if x is None else f"{x.dtype} {tuple(x.shape)}"
                raise ValueError(f"layer {target.name} was called with {seen}, expected (..., {target.in_features})")
            self.observe(target.name, x.detach())

        return observe

    def observe(self, name: str, x: torch.Tensor) -> None:
        weight, fits = align(self.weights, x.shape[:-1])
        if not fits:
            shape = None if self.weights is None else tuple(self.weights.shape)
            self.unaligned.setdefault(name, f"mask {shape} does not match input {tuple(x.shape)}: all rows counted")
        self.aligned_once |= weight is not None
        moments = self.sharing.assign(name, x, self.dtype)
        if moments is None:
            return
        if self.nonfinite == "skip":
            finite = torch.isfinite(x).all(dim=-1)
            dropped = ~finite if weight is None else ~finite & (weight != 0)
            self.skipped[name] = self.skipped.get(name, 0) + int(dropped.sum())
            weight = finite if weight is None else weight * finite
        moments.update(x, weight)

    def check(self, batch: int) -> None:
        """After a batch: groups held, sums finite (one wait for the device for all layers)."""
        self.sharing.end()
        if self.weights is not None and not self.aligned_once:
            raise ValueError(
                f"the mask has shape {tuple(self.weights.shape)}, which matches the input of no observed layer; "
                "pass mask=None or a mask function"
            )
        groups = {id(group): group for group in self.sharing.groups.values()}.values()
        if not groups:
            return
        finite = torch.stack([torch.isfinite(group.moments.total).all().cpu() for group in groups]).tolist()
        for group, good in zip(groups, finite, strict=True):
            if not good:
                raise ValueError(
                    f"non-finite input (NaN or infinity) in layer {', '.join(group.members)} in batch {batch}; "
                    'nonfinite="skip" leaves such rows out'
                )

    def result(self, name: str) -> LayerStatistics:
        target, group = self.targets[name], self.sharing.groups.get(name)
        notes = [self.unaligned[name]] if name in self.unaligned else []
        if group is None:
            notes.append("never called in this pass")
        others = tuple(each for each in group.members if each != name) if group else ()
        moments = group.moments if group else None
        return LayerStatistics(name, target.in_features, target.out_features, moments, others, tuple(notes))


def _counted(weights: torch.Tensor | None, recorder: _Recorder, before: float) -> float:
    if weights is not None:
        return before + float(weights.sum(dtype=torch.float64))
    groups = list(recorder.sharing.groups.values())
    return groups[0].moments.tokens if groups else before


def collect(
    model: nn.Module,
    loader: Iterable[Any],
    targets: Sequence[Target],
    *,
    mask: Mask = "attention",
    forward: Forward | None = None,
    max_batches: int | None = None,
    max_tokens: int | None = None,
    share_inputs: bool = True,
    nonfinite: str = "raise",
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> Statistics:
    """Read batches and accumulate the input moments of the target layers.

    The model runs in evaluation mode without gradients. Training flags, hooks and random states are restored whatever
    happens.

    Args:
        model: the model.
        loader: yields batches; only what is needed is read.
        targets: the layers to observe.
        mask: which tokens count; see `token_weights`.
        forward: called as `forward(model, batch)`; by default a mapping is passed as keywords.
        max_batches: read at most this many batches.
        max_tokens: stop after the batch that reaches this many counted tokens.
        share_inputs: let layers that read the same tensor share one set of sums.
        nonfinite: `raise`: NaN or infinity in an input is an error; `skip`: such rows are left out and counted.
        dtype: dtype of the sums, float32 or float64.
        progress: show a progress bar.

    Returns:
        The statistics of every target.

    Raises:
        ValueError: on an argument out of range, an empty loader, a batch set without any counted token, or an input
            that is not finite.
        RuntimeError: if the sharing of inputs changes between batches.
    """
    check_mask(mask)
    check_choice("nonfinite", nonfinite, ("raise", "skip"))
    check_choice("dtype", dtype, (torch.float32, torch.float64))
    for name, bound in (("max_batches", max_batches), ("max_tokens", max_tokens)):
        if bound is not None:
            check_range(name, bound, low=1, integer=True)
    if not targets:
        raise ValueError("targets is empty: there is no layer to observe")
    run = forward or call_model
    device = model_device(model)
    length = len(loader) if isinstance(loader, Sized) else None
    total = min((each for each in (length, max_batches) if each is not None), default=None)
    sharing = InputSharing(share=share_inputs)
    started, batches, tokens = time.perf_counter(), 0, 0.0
    with (
        observation_mode(model),
        _Recorder(targets, sharing, dtype, nonfinite) as recorder,
        tqdm(total=total, desc="collecting statistics", unit="batch", disable=not progress, leave=False) as bar,
    ):
        for batch in loader:
            batch = to_device(batch, device)
            recorder.weights = token_weights(batch, mask)
            sharing.begin(batches)
            run(model, batch)
            recorder.check(batches)
            tokens = _counted(recorder.weights, recorder, tokens)
            batches += 1
            bar.update()
            if batches == max_batches or (max_tokens is not None and tokens >= max_tokens):
                break
    if batches == 0:
        raise ValueError("loader is empty: it yielded no batch")
    layers = {target.name: recorder.result(target.name) for target in targets}
    if all(each.input is None or each.input.tokens <= 0 for each in layers.values()):
        raise ValueError(f"no token was counted in {batches} batches: every token is masked, or no target was called")
    if recorder.unaligned:
        warnings.warn(
            f"the mask does not match the input rows of {len(recorder.unaligned)} layers "
            f"(first: {next(iter(recorder.unaligned))}); all their rows were counted",
            RuntimeWarning,
            stacklevel=2,
        )
    return Statistics(layers, batches, tokens, time.perf_counter() - started, recorder.skipped)
