"""One call of `initialize` as an object: `check`, `collect`, `solve`, `write`, `report`."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import KW_ONLY, asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from lora_kernels._checks import check_choice, check_range, check_type
from lora_kernels.adapters import parts, starting, writing
from lora_kernels.adapters.base_weight import dense_weight, why_unreadable
from lora_kernels.adapters.dora import magnitudes, reset_magnitudes
from lora_kernels.adapters.experts import observed as observed_experts
from lora_kernels.adapters.layers import AdapterLayer, AdapterLayers, base_model_only, left_out_by_peft
from lora_kernels.api import guidance
from lora_kernels.api.learning_rate import OPTIMIZERS, LearningRateAdvice, advise
from lora_kernels.api.report import InitReport, LayerReport, experts_together
from lora_kernels.init import InitMethod, LayerFactors, Redistribution
from lora_kernels.init.problem import BaseLayer, LoraFactors
from lora_kernels.init.ranks import RankRule
from lora_kernels.ops._autocast import without_autocast
from lora_kernels.runtime.processes import unwrap, world_size
from lora_kernels.runtime.progress import progress_bars
from lora_kernels.statistics import Statistics, Target
from lora_kernels.statistics import collect as collect_targets
from lora_kernels.statistics.options import read_options


def observed(layers: AdapterLayers) -> tuple[Sequence[Target], Mapping[str, str]]:
    """What is observed of an adapter's layers, and why others are not."""
    targets = [Target(layer.name, layer.module, *reversed(layer.shape)) for layer in layers.supported]
    return targets, {name: why for name, _, why in layers.unsupported}


@dataclass
class Start:
    """A start of an adapter; for the arguments see `initialize`. Its steps are called in the order of this class."""

    model: nn.Module
    method: InitMethod
    _: KW_ONLY
    adapter: str = "default"
    base: str = "intact"
    ranks: Redistribution | None = None
    learning_rate: float | None = None
    suggest_rate: bool = False
    optimizer: str = "adamw"
    unreached: str = "warn"
    force: bool = False

    layers: AdapterLayers = field(init=False)
    statistics: Statistics = field(init=False)
    answers: dict[str, LayerFactors] = field(init=False)  # by layer; empty factors where no component won a rank
    layer_reports: tuple[LayerReport, ...] = field(init=False)
    rate_advice: LearningRateAdvice | None = field(init=False, default=None)
    seconds: dict[str, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._started = self._lap = time.perf_counter()
        self._replicated = isinstance(self.model, nn.parallel.DistributedDataParallel)
        self.model = unwrap(self.model)
        check_type("ranks", self.ranks, (Redistribution, type(None)), "a Redistribution")
        check_choice("unreached", self.unreached, ("warn", "raise"))
        check_type("suggest_rate", self.suggest_rate, bool, "true or false")
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("base", self.base, ("intact", "mutate"))
        check_range("learning_rate", self.learning_rate, low=0.0, optional=True)
        if self.ranks is not None:
            self.method = self.method.keeping_ranks()

    @property
    def wants(self) -> dict[str, bool]:
        """The statistics that the method and the redistribution read; true where the exact sums are needed."""
        own, more = self.method.wants, {} if self.ranks is None else self.ranks.wants
        return {name: bool(own.get(name)) or bool(more.get(name)) for name in (*own, *more)}

    @property
    def rule(self) -> RankRule | None:
        """How ranks change, if they do."""
        return self.method.redistribution if self.ranks is None else self.ranks

    def check(self) -> None:
        """Find the layers, and refuse before any data is read what could not be done afterwards."""
        why = None if self.rule is None else "ranks are redistributed, and PEFT has one rank for all experts"
        if self.method.offsets_base and self.base == "mutate":
            why = 'base="mutate" changes the weights of linear layers alone'
        self.layers = starting.startable_layers(self.model, self.adapter, force=self.force, without_experts=why)
        layers = self.layers.supported
        if self.method.reads_base:
            starting.check_readable(layers)
            if world_size() > 1:
                starting.check_not_sharded(layers, self.method.name)
        if self.method.offsets_base:
            starting.check_offset(self.model, self.layers, self.adapter, self.base)
        elif self.force or self.method.moves_function:  # DoRA's magnitudes are set again, from the weight
            starting.check_readable(layer for layer in layers if magnitudes(layer.module, self.adapter) is not None)
        if self.rule is not None:
            limits = {layer.name: min(layer.shape) for layer in layers}
            self.rule.check({layer.name: layer.rank for layer in layers}, limits)

    def collect(self, loader: Iterable[Any] | None, statistics: Statistics | None, options: Mapping[str, Any]) -> None:
        """Read the data, unless the method reads none or statistics are given."""
        if not self.wants:
            self.statistics = statistics or Statistics()
        elif statistics is not None:
            if unused := sorted(set(options) - {"progress"}):
                raise TypeError(f"{', '.join(unused)}: options of a collection, but statistics are given")
            self.statistics = statistics
        else:
            assert loader is not None  # checked by `initialize`
            targets, skipped = observed(self.layers)
            ranks = [layer.rank for layer in self.layers.supported]
            size = max(64, self.method.sketch_size(ranks), 0 if self.ranks is None else self.ranks.sketch_size(ranks))
            chosen = read_options({"sketch_size": size, **self.method.collect_options, **options})
            with base_model_only(self.model), observed_experts(target.module for target in targets):
                self.statistics = collect_targets(
                    self.model, loader, targets, self.wants, chosen, skipped_modules=skipped
                )
        dataset = getattr(loader, "dataset", None)
        if isinstance(dataset, Sized) and len(dataset) > 0:
            self.method = self.method.for_samples(len(dataset))
        self._clock("collect")

    @without_autocast()
    def solve(self, *, progress: bool) -> None:
        """Compute the factors of all layers that data reached, and what the report says of them."""
        reached = self._reached_ranks()
        assigned = reached if self.ranks is None else self.ranks.assign(self.statistics, reached)
        layers = {layer.name: layer for layer in self.layers.supported}
        kept = {name: rank for name, rank in assigned.items() if rank > 0}
        resized = {name: layers[name].with_rank(rank, adjust=self._adjust) for name, rank in kept.items()}
        base = {name: self._base_layer(layer) for name, layer in resized.items()}
        with progress_bars(progress):
            self.answers = self.method.factors(self.statistics, kept, base=base)
        for name in assigned.keys() - kept.keys():
            m, n = layers[name].shape
            empty = LoraFactors(torch.zeros(0, n), torch.zeros(m, 0))
            self.answers[name] = LayerFactors(empty, notes=("no component won a rank",))
        if self._replicated and any(answer.factors.rank != reached[name] for name, answer in self.answers.items()):
            raise ValueError(
                "ranks of a model in DistributedDataParallel cannot change, since it averages no gradients of the "
                "new factors: initialise before wrapping the model, or keep the ranks (rho=1)"
            )
        # Before base weights may change: the start is compared with what they were.
        left_out = self.layers.unsupported
        others = (LayerReport(name, "unsupported", rank, rank, notes=(why,)) for name, rank, why in left_out)
        reports = [(layer, self._layer_report(layer)) for layer in self.layers.supported]
        self.layer_reports = (*experts_together(reports), *others)
        self._clock("decompose")

    def _reached_ranks(self) -> dict[str, int]:
        """The ranks of the layers that data reached; of all layers for a method that reads no data."""
        if not self.wants:
            return {layer.name: layer.rank for layer in self.layers.supported}
        reached, missed = {}, []
        for layer in self.layers.supported:
            name = layer.name
            if name not in self.statistics:
                raise ValueError(f"statistics have no entry for layer {name}: they come from another model or adapter")
            sums = self.statistics[name]
            if (sums.out_features, sums.in_features) != layer.shape:
                raise ValueError(f"statistics of layer {name} are of another shape: they come from another model")
            if sums.reached(self.wants):
                reached[name] = layer.rank
            else:
                missed.append(name)
        if missed:
            message = f"the data, or its loss, does not reach {len(missed)} LoRA layers (first: {missed[0]})"
            if self.unreached == "raise":
                raise ValueError(message)
            warnings.warn(f"{message}; they keep their stock initialisation", RuntimeWarning, stacklevel=5)
        return reached

    @property
    def _adjust(self) -> bool:
        """Whether alpha follows where a rank changes."""
        return self.rule is not None and self.rule.adjust_scaling_factors

    def _base_layer(self, layer: AdapterLayer) -> BaseLayer:
        def factors() -> LoraFactors:
            a, b = layer.view.factors(self.adapter)
            return LoraFactors(a.to(torch.float32, copy=True), b.to(torch.float32, copy=True))

        return BaseLayer(
            lambda: dense_weight(layer.module, layer.name).to(torch.float32), layer.scaling, factors, layer.shape
        )

    def _layer_report(self, layer: AdapterLayer) -> LayerReport:
        name, sums = layer.name, self.statistics.get(layer.name)
        notes = () if sums is None else sums.notes
        if name not in self.answers:
            return LayerReport(name, "not_reached", layer.rank, layer.rank, notes=notes)
        answer = self.answers[name]
        factors, share, outlook = answer.factors, 0.0, {}
        if factors.rank:
            scaling = layer.with_rank(factors.rank, adjust=self._adjust).scaling
            outlook = guidance.outlook(factors, scaling, self.statistics, name, offset=self.method.offsets_base)
            a, b = factors.A.detach().to(torch.float64), factors.B.detach().to(torch.float64)
            # |s B A| by the Gram matrices of the factors.
            start = abs(scaling) * math.sqrt(max(0.0, float(((b.mT @ b) * (a @ a.mT)).sum())))
            unreadable = why_unreadable(layer.module) if start > 0 else None
            if unreadable is not None:
                notes = (*notes, f"start not compared with the weight: {unreadable}")
            elif start > 0:
                share = start / float(torch.linalg.vector_norm(dense_weight(layer.module, name)))
        rows = self.statistics.skipped_rows.get(name, 0)
        explained = None if math.isnan(answer.explained_variance) else answer.explained_variance
        stock = "stock" if answer.solver == "stock" else "initialised"
        return LayerReport(
            name=name,
            status=stock if factors.rank else "removed",
            rank_before=layer.rank,
            rank=factors.rank,
            explained_variance=explained,
            residual_variance=None if explained is None else max(0.0, 1.0 - explained),
            tokens=0.0 if sums is None else sums.tokens,
            shared_with=() if sums is None else sums.shared_with,
            eigen_residual=answer.residual,
            solver=answer.solver,
            start_share=share,
            **outlook,
            notes=(*notes, *answer.notes, *((f"{rows} non-finite rows skipped",) if rows else ())),
        )

    @without_autocast()
    def write(self) -> None:
        """Write the factors into the adapter, and take off the function what the start must not change."""
        from lora_kernels.adapters.config import describe, tidy_up  # noqa: PLC0415  (imports peft)

        answered = [layer for layer in self.layers.supported if layer.name in self.answers]
        # A layer that keeps its values keeps its frozen start. All experts of a parameter have one.
        carriers = {starting.carrier(layer): self.answers[layer.name].factors.rank > 0 for layer in answered}
        for module in carriers:
            parts.remove(module, self.adapter, parts.START)
        factors = {name: (answer.factors.A, answer.factors.B) for name, answer in self.answers.items()}
        writing.write(self.model, self.layers, factors, self.adapter, adjust_scaling_factors=self._adjust)
        started = [layer for layer in answered if self.answers[layer.name].factors.rank]
        for layer in started:
            # A fresh magnitude is |W| already, to the bits by which PEFT divides it.
            if self.force or bool(factors[layer.name][1].any()):
                reset_magnitudes(layer.module, self.adapter)
        if self.method.offsets_base:
            describe(self.model, self.adapter)
            for module, has_rank in carriers.items():
                if has_rank:
                    starting.take_off(module, self.adapter, self.base)
            if self.base == "mutate":
                self.model.peft_config[self.adapter].mutated = True  # type: ignore[index, union-attr, operator]
        tidy_up(self.model, self.adapter)
        self._clock("write")

    def measure_rate(self, loader: Iterable[Any] | None, options: Mapping[str, Any]) -> None:
        """Suggest a learning rate from the loss along the first step of training."""
        if self.suggest_rate:
            self.rate_advice = advise(self.model, loader, self.optimizer, options)
            self._clock("rate")

    def report(self) -> InitReport:
        """What was done, with warnings about the learning rate."""
        advice = self._advice()
        for sentence in advice:
            if sentence.startswith(guidance.WARNING):
                warnings.warn(sentence, RuntimeWarning, stacklevel=3)
        ranks = {"ranks": asdict(self.ranks)} if self.ranks is not None else {}
        return InitReport(
            method=self.method.name,
            settings={**asdict(self.method), **ranks},
            adapter=self.adapter,
            layers=self.layer_reports,
            seconds={**self.seconds, "total": self._lap - self._started},
            batches=self.statistics.batches,
            tokens=self.statistics.tokens,
            trainable_before=self._trainable({}),
            trainable=self._trainable({name: answer.factors.rank for name, answer in self.answers.items()}),
            advice=advice,
            learning_rate=self.rate_advice,
        )

    def _advice(self) -> tuple[str, ...]:
        outside = moved = None
        if self.rate_advice is not None and self.learning_rate is not None:
            outside = self.rate_advice.judge(self.learning_rate)
        if self.method.moves_function:
            change = math.fsum(layer.start_change or 0.0 for layer in self.layer_reports)
            moved = f"{self.method.name} moves the model's function at the start: the loss is predicted to change by "
            moved += f"{change:.2g}"
        rates = guidance.advice(
            self.method.name,
            [layer.step_ratio for layer in self.layer_reports if layer.step_ratio is not None],
            starts_away=any(bool(answer.factors.B.any()) for answer in self.answers.values()),
            full_rate=self.method.full_rate,
            learning_rate=self.learning_rate,
        )
        remarks = self.method.remarks(self.statistics)
        sentences = (outside, left_out_by_peft(self.model, self.adapter), moved, *remarks, *rates)
        return tuple(sentence for sentence in sentences if sentence is not None)

    def _trainable(self, ranks: Mapping[str, int]) -> int:
        """Number of entries of all factors, with these ranks where they are not the layer's own."""
        return sum(ranks.get(layer.name, layer.rank) * sum(layer.shape) for layer in self.layers.supported)

    def _clock(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[step], self._lap = now - self._lap, now
