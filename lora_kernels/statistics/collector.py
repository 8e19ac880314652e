"""Passes over data with hooks on the observed layers."""

from __future__ import annotations

import functools
import hashlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lora_kernels.runtime import processes
from lora_kernels.runtime.feed import Feed, call_model, model_device, to_device, trimmer
from lora_kernels.runtime.loss import batch_size, loss_items, model_loss
from lora_kernels.runtime.modes import is_sharded, observation_mode
from lora_kernels.runtime.processes import Result
from lora_kernels.statistics import distributed, storage
from lora_kernels.statistics.fingerprint import agree_on_start, check_fingerprint, fingerprint
from lora_kernels.statistics.masks import BatchWeights
from lora_kernels.statistics.observe import Observer, is_encoder_decoder
from lora_kernels.statistics.options import CollectOptions, Wants, resolve_wants
from lora_kernels.statistics.plan import Plan, parse_budget
from lora_kernels.statistics.sharing import InputGroup, find_groups
from lora_kernels.statistics.storage import LayerSums, Progress
from lora_kernels.statistics.store import Statistics, Target, assemble
from lora_kernels.statistics.sums import needs_backward


class _FailedElsewhere(Exception):
    """Another process has failed in this step; it says why after the pass."""


class Collection:
    """One call of `collect`: its plan, its sums, and how far it has come."""

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        targets: Sequence[Target],
        wants: Mapping[str, bool],
        options: CollectOptions,
        skipped_modules: Mapping[str, str],
    ) -> None:
        """Check the arguments and take up the checkpoint, if there is one."""
        if not targets:
            raise ValueError("targets is empty: there is no layer to observe")
        self.model, self.loader, self.targets = processes.unwrap(model), loader, targets
        self.wants, self.options = wants, options
        self.device = model_device(self.model)
        self.world = processes.world_size() if options.distributed else 1
        # The forward of a sharded model is a collective call: all processes must take the same number of steps.
        self.lockstep = self.world > 1 and any(is_sharded(parameter) for parameter in self.model.parameters())
        self.encoder_decoder = is_encoder_decoder(self.model)
        self._told = False
        self._trim = trimmer(self.model, [target.module for target in targets])
        self.progress = Progress(skipped_modules=dict(skipped_modules))
        self.finished: list[LayerSums] = []
        self.resumed: list[LayerSums] = []
        self.path: Path | None = None
        self.identity: dict[str, Any] = fingerprint(self.model, targets, wants, options)
        if options.checkpoint is not None:
            self._resume(Path(options.checkpoint))

    def _resume(self, path: Path) -> None:
        if self.world > 1:
            path = path.with_name(f"{path.name}.{processes.rank()}-of-{self.world}")
        self.path = path
        self.identity["form"] = [self.options.form, str(self.options.budget)]
        if not path.exists():
            return
        parts, self.progress, stored = storage.read(path, self.device)
        check_fingerprint(path, stored, self.identity)
        current = 0 if self.progress.complete else self.progress.current
        self.finished, self.resumed = parts[: len(parts) - current], parts[len(parts) - current :]

    def _together(self, step: Callable[[], Result]) -> Result:
        return processes.together(step) if self.world > 1 else step()

    def plan(self) -> Plan:
        """The plan; with a budget, a first forward pass finds which layers read the same tensor."""
        budget = self._together(lambda: parse_budget(self.options.budget, self.device))
        groups = None
        one_shot = isinstance(self.loader, Iterator)
        if budget is not None and self.options.share_inputs and not one_shot:
            groups = self._probe()
        if self.world > 1:
            budget, groups = distributed.agree_on_plan(budget, groups)
        plan = self.options.plan(self.targets, self.wants, groups, budget, self.world)
        if plan.passes > 1 and one_shot:
            raise ValueError(
                f"the budget needs {plan.passes} passes over the data, but the loader is an iterator that can be read "
                "once: pass a list or a DataLoader, a larger budget, or form='sketch'"
            )
        return plan

    def _probe(self) -> list[list[str]] | None:
        batch = self._together(lambda: next(iter(self.loader), None))
        if self.lockstep:
            batch = distributed.first_batch(batch, batch is not None)

        def find() -> list[list[str]] | None:
            if batch is None:
                return None
            with observation_mode(self.model, gradients=False):
                return find_groups(self.model, self.targets, to_device(batch, self.device), self.options.forward)

        return self._together(find)

    def run(self) -> Statistics:
        """All passes, the reduction over processes, and the final file."""
        everyone = [self.progress]
        if self.world > 1:
            everyone = agree_on_start(self.identity, self.progress)
            self.progress.apart = sorted({name for progress in everyone for name in progress.apart})
        if not all(progress.complete for progress in everyone):
            plan = self.plan()
            self._together(lambda: self._check_plan(plan))
            # A run of several processes may have been stopped when only some of them had finished a pass.
            for number in range(min(progress.number for progress in everyone), plan.passes):
                self._together(functools.partial(self._pass, plan, number))
        parts, progress = self.finished, self.progress
        if self.world > 1:
            parts = distributed.agree(parts, self.device)
            distributed.all_reduce(parts, self.device)
            progress = distributed.reduce_progress(progress)
        targets = [(target.name, target.in_features, target.out_features) for target in self.targets]
        statistics = assemble(targets, parts, progress, self.identity)
        _check_reached(statistics, self.wants)
        return statistics

    def _check_plan(self, plan: Plan) -> None:
        digest = hashlib.blake2b(repr(plan.entries).encode(), digest_size=8).hexdigest()
        if self.progress.plan not in ("", digest):
            raise ValueError(
                f"{self.path} was begun under another plan (the free memory has changed?): give budget= in bytes, "
                "as it was then, or delete the file"
            )
        self.progress.plan = digest

    def _pass(self, plan: Plan, number: int) -> None:
        """Read the data once, unless this process has done so; then only in step with the others, if it must."""
        progress, options = self.progress, self.options
        ahead = progress.number > number
        if ahead and not self.lockstep:
            return
        started, earlier = time.perf_counter(), progress.seconds
        observer = Observer(self.model, self.targets, plan, number, options, progress.apart)
        if not ahead:
            self._restore(observer)
        length = len(self.loader) if isinstance(self.loader, Sized) else None
        total = min((limit for limit in (length, options.max_batches) if limit is not None), default=None)
        loader = () if ahead else self.loader
        skip, digests = 0 if ahead else progress.done, self.path is not None
        feed = Feed(loader, options.max_batches, skip=skip, expected=progress.digest, digests=digests)
        label = "collecting statistics" + (f", pass {number + 1} of {plan.passes}" if plan.passes > 1 else "")
        with (
            observation_mode(self.model, gradients=observer.gradients),
            observer,
            tqdm(total=total, desc=label, unit="batch", disable=not options.progress, leave=False) as bar,
        ):
            bar.update(progress.done)
            steps = self._lockstep(feed) if self.lockstep else ((batch, True) for batch in feed)
            try:
                for step, (batch, counts) in enumerate(steps):
                    observer.counting = counts
                    tokens = self._step(observer, batch, feed.done - 1, first=step == 0)
                    if not counts:
                        continue
                    progress.done, progress.digest = feed.done, feed.digest
                    progress.seconds = earlier + time.perf_counter() - started
                    self._note(observer)
                    bar.update()
                    if self.path is not None and feed.done % options.checkpoint_every == 0:
                        current = _sums_of(observer)
                        progress.current = len(current)
                        storage.write(self.path, [*self.finished, *current], progress, self.identity)
                    if options.max_tokens is not None and tokens >= options.max_tokens:
                        feed.stopped = True
            except _FailedElsewhere:
                return
            except Exception:
                if self.lockstep and not self._told:  # the others wait for this process's next step
                    distributed.step_state(distributed.FAILED, self.device)
                raise
        if ahead:
            return
        observer.check_all()
        self.resumed = []
        sums = _sums_of(observer)
        for part in sums if plan.passes > 1 else ():  # they make room on the device
            part.sums.to(torch.device("cpu"))
        self.finished += sums
        _warn_unaligned(observer)
        progress.number, progress.done, progress.digest, progress.current = number + 1, 0, "", 0
        progress.complete = progress.number == plan.passes
        if self.path is not None:
            storage.write(self.path, self.finished, progress, self.identity)

    def _lockstep(self, feed: Feed) -> Iterator[tuple[Any, bool]]:
        """Yield batches until no process has one, and whether they count: those without one repeat a batch."""
        batches, batch = iter(feed), None
        while True:
            fresh = next(batches, None)
            state = distributed.step_state(distributed.IDLE if fresh is None else distributed.READY, self.device)
            if state != distributed.READY:  # all are done, or one failed and says so after the pass
                return
            batch = fresh if fresh is not None else batch
            batch = distributed.first_batch(batch, batch is not None)
            yield batch, fresh is not None

    def _step(self, observer: Observer, batch: Any, number: int, *, first: bool) -> float:
        """One batch; returns the tokens counted so far."""
        progress, options = self.progress, self.options
        batch = to_device(batch, self.device)
        factors, items = None, 0.0
        if observer.gradients:
            per_sample = loss_items(self.model, batch, options.reduction)
            items = float(per_sample.sum())
            if options.weighting == "sample":
                factors = torch.where(per_sample > 0, 1.0 / per_sample.clamp_min(1.0), 0.0).to(options.dtype)
        weights = BatchWeights.of(batch, options.mask, encoder_decoder=self.encoder_decoder, factors=factors)
        given = batch if observer.gradients or options.forward is not None else self._trim(batch)
        forward = options.forward or call_model
        observer.begin(number, weights, batch)
        outputs = forward(self.model, given)
        if self._separate(observer, number, first=first):
            observer.begin(number, weights, batch)
            outputs = forward(self.model, given)
        # Sharded weights are gathered in the backward pass too: there every process must go through it.
        if observer.gradients and (items > 0 or self.lockstep):
            counts = items > 0 and observer.counting
            loss = self._loss(observer, outputs, batch, number if counts else None)
            del outputs  # the backward pass does not read its logits, nor does it have to hold them
            observer.backward(loss if options.reduction == "sum" else loss * items, discard=not counts)
        if not observer.counting:
            return progress.tokens
        observer.check(number)
        if progress.number == 0:
            progress.batches += 1
            progress.samples += batch_size(batch)
            progress.tokens = self._counted(weights, observer)
        if observer.gradients and progress.number == observer.plan.backward:
            progress.loss_items += items if factors is None else float((factors > 0).sum())
        return progress.tokens

    def _separate(self, observer: Observer, number: int, *, first: bool) -> bool:
        """Part layers that share a tensor in some calls only; whether the batch must run again (the first one can)."""
        names = observer.sharing.deviating() if observer.counting else []
        fresh = first and self.progress.done == 0 and not self.resumed
        if self.lockstep and first:
            everyone = processes.gather((names, fresh))
            fresh = all(other for _, other in everyone)
            if fresh:  # all run the batch again, or none
                names = [name for others, _ in everyone for name in others]
        if not names:
            return False
        if fresh:
            self.progress.apart = sorted({*self.progress.apart, *names})
            observer.restart(self.progress.apart)
            return True
        for name in names:
            observer.sharing.leave_out(name)
            self.progress.left_out.append(name)
            note = f"no input_second: it stopped sharing its input in batch {number}; pass share_inputs=False"
            self.progress.notes.setdefault(name, []).append(note)
        return False

    def _loss(self, observer: Observer, outputs: Any, batch: Any, number: int | None) -> torch.Tensor:
        """The loss of a batch, checked if the batch has a number; where one process has none, no one goes on."""
        try:
            loss = (self.options.loss or model_loss)(outputs, batch)
            if number is not None:
                observer.check_loss(loss, number)
        except Exception:
            if self.lockstep:
                distributed.step_state(distributed.FAILED, self.device)
                self._told = True
            raise
        if self.lockstep and distributed.step_state(distributed.READY, self.device) == distributed.FAILED:
            raise _FailedElsewhere
        return loss

    def _counted(self, weights: BatchWeights, observer: Observer) -> float:
        if weights.tokens is not None:
            return self.progress.tokens + float(weights.tokens.sum(dtype=torch.float64))
        sums = _sums_of(observer)
        return sums[0].sums.tokens if sums else self.progress.tokens

    def _note(self, observer: Observer) -> None:
        for name, count in observer.skipped.items():
            self.progress.skipped_rows[name] = count + self._skipped_before.get(name, 0)
        for name, note in (*observer.unaligned.items(), *observer.unassigned.items()):
            lines = self.progress.notes.setdefault(name, [])
            if note not in lines:
                lines.append(note)

    def _restore(self, observer: Observer) -> None:
        self._skipped_before = dict(self.progress.skipped_rows)
        observer.sharing.left_out.update(self.progress.left_out)
        for part in self.resumed:
            statistic = part.sums.statistic
            if part.sums.needs_backward:
                observer.outputs.setdefault(part.layers[0], {})[statistic] = part.sums
            else:
                group = InputGroup(part.sums, -1, list(part.layers))  # type: ignore[arg-type]
                observer.sharing.groups |= dict.fromkeys(part.layers, group)


def _sums_of(observer: Observer) -> list[LayerSums]:
    inputs = [LayerSums(list(group.members), group.sums) for group in observer.sharing.distinct()]
    return inputs + [LayerSums([name], part) for name, part in observer.output_sums()]


def _warn_unaligned(observer: Observer) -> None:
    if observer.unaligned:
        warnings.warn(
            f"the mask does not match the input rows of {len(observer.unaligned)} layers "
            f"(first: {next(iter(observer.unaligned))}); all their rows were counted",
            RuntimeWarning,
            stacklevel=4,
        )
    if observer.unassigned:
        first, why = next(iter(observer.unassigned.items()))
        count = len(observer.unassigned)
        warnings.warn(f"no gradients of {count} layers (first: {first}): {why}", RuntimeWarning, stacklevel=4)


def _check_reached(statistics: Statistics, wants: Mapping[str, bool]) -> None:
    if statistics.batches == 0:
        raise ValueError("loader is empty: it yielded no batch")
    if all(layer.tokens <= 0 for layer in statistics.values()):
        raise ValueError(
            f"no token was counted in {statistics.batches} batches: every token is masked, or no target was called"
        )
    if needs_backward(wants) and statistics.loss_items <= 0:
        raise ValueError(
            f"no item has a loss in {statistics.batches} batches: every label is -100 (needed for {', '.join(wants)})"
        )


def collect(
    model: nn.Module,
    loader: Iterable[Any],
    targets: Sequence[Target],
    wants: Wants = None,
    options: CollectOptions | None = None,
    *,
    skipped_modules: Mapping[str, str] | None = None,
) -> Statistics:
    """Read batches and accumulate the statistics of the target layers.

    The model runs in evaluation mode; no parameter requires a gradient and no `.grad` is computed. Training flags,
    `requires_grad` flags, hooks and random states are restored whatever happens.

    Args:
        model: the model; DistributedDataParallel is looked through, FSDP2 (`fully_shard`) works as it is.
        loader: yields batches; only what is needed is read.
        targets: the layers to observe.
        wants: the statistics; see `resolve_wants`.
        options: how; see `CollectOptions`.
        skipped_modules: reported as they are.

    Returns:
        The statistics of every target, added up over all processes.

    Raises:
        ValueError: on an argument out of range, an empty loader, a batch set without any counted token, an input,
            gradient or loss that is not finite, or a checkpoint of something else.
        RuntimeError: if another process failed.
    """
    chosen = options or CollectOptions()

    def prepare() -> Collection:
        return Collection(model, loader, targets, resolve_wants(wants), chosen, skipped_modules or {})

    return (processes.together(prepare) if chosen.distributed else prepare()).run()
