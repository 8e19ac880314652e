"""What the backward pass tells about a layer: Fisher diagonal, output second moment, weight gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lora_kernels.ops.gradient_statistics import gradient_statistics_
from lora_kernels.statistics.moments import Accumulator, InputMoments, as_rows
from lora_kernels.statistics.sketches import GradientSketch
from lora_kernels.statistics.wants import FISHER, GRADIENT, OUTPUT_SECOND


class OutputStatistics(Accumulator):
    """Sums over tokens of one layer's output gradients `g_t = d(sum of losses)/dy_t` (METHODS).

    They add over batches and over processes. `g_t` is the gradient of the *sum* of the losses of all items (or of the
    mean loss of each sample, see `loss.py`), so nothing depends on the batch size: divide the weight gradient by
    `Statistics.loss_items` for the mean loss gradient, and the Fisher diagonal by `count` for the mean over tokens.

    Attributes:
        out_features: m.
        in_features: n.
        count: scalar float64 tensor, `sum w_t` over the rows of the layer.
        fisher: `(m,)`, `sum w_t g_t^2`, or `None` where it was not asked for.
        second: moments of g, or `None`.
        gradient: `(m, n)`, `sum g_t x_t^T` over all rows (a mask would falsify it: rows without a loss of their own
            still move the losses of later ones), or `None`.
        sketch: the two-sided sketch of the same, or `None`.
        calls: how often the layer received a gradient.
    """

    kind = "output"
    fields = ("count", "calls")
    triangular = ("second.second",)

    def __init__(
        self,
        out_features: int,
        in_features: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        forms: Mapping[str, str],
        sketch: Mapping[str, int] | None = None,
    ) -> None:
        """Start at zero.

        Args:
            out_features: m.
            in_features: n.
            device: where the sums live.
            dtype: float32, or float64 for reference work.
            forms: by statistic name, `exact` or `sketch`.
            sketch: `size`, `co_size`, `seed` and `stream` of a sketched gradient.
        """
        self.out_features, self.in_features = out_features, in_features
        self.forms, self._sketch_settings = dict(forms), dict(sketch or {})
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.calls = torch.zeros((), dtype=torch.float64, device=device)
        self.fisher: torch.Tensor | None = None
        self.second: InputMoments | None = None
        self.gradient: torch.Tensor | None = None
        self.sketch: GradientSketch | None = None
        if FISHER in forms:
            self.fisher = torch.zeros(out_features, dtype=dtype, device=device)
        if OUTPUT_SECOND in forms:
            self.second = InputMoments(out_features, device, dtype)
        if forms.get(GRADIENT) == "exact":
            self.gradient = torch.zeros(out_features, in_features, dtype=dtype, device=device)
        elif GRADIENT in forms:
            self.sketch = GradientSketch(out_features, in_features, device, dtype, **self._sketch_settings)

    @property
    def needs_input(self) -> bool:
        """Whether `update` reads x."""
        return GRADIENT in self.forms

    def update(
        self,
        g: torch.Tensor,
        x: torch.Tensor | None,
        weight: torch.Tensor | None = None,
        factors: torch.Tensor | None = None,
    ) -> None:
        """Add the gradients of a call.

        Args:
            g: `(..., m)`.
            x: `(..., n)`, the input of the call; only read where the weight gradient is asked for.
            weight: `(...)` bool or real, which rows count in the Fisher diagonal and the second moment.
            factors: `(...)` real, multiplies g of each row; bool: rows that count at all (in `weight` too).
        """
        self.calls += 1
        # A selection of rows needs no more than `weight`, which has it too.
        scale = None if factors is None or factors.dtype == torch.bool else factors
        squared = weight
        if scale is not None:
            squared = scale.square() if weight is None else scale.square() * weight
        g, x = as_rows(g, self.dtype), None if x is None else as_rows(x, self.dtype)
        if self.fisher is not None or self.gradient is not None:
            gradient_statistics_(
                self.gradient,
                self.fisher,
                g,
                x if self.gradient is not None else None,
                weight=factors,
                fisher_weight=None if self.fisher is None else squared,
            )
        if self.second is not None:
            # Not by squared weights: the count is of tokens.
            self.second.update(g if scale is None else g * scale.unsqueeze(-1), weight)
        if self.sketch is not None:
            assert x is not None  # needs_input
            self.sketch.update(g, x, factors)

    @property
    def is_zero(self) -> bool:
        """Whether one of the sums is zero throughout: the loss of the data does not depend on the layer."""
        parts = (self.fisher, self.gradient, None if self.sketch is None else self.sketch.left)
        return any(not bool(each.any()) for each in parts if each is not None)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the sums."""
        return next(value.dtype for name, value in self.tensors().items() if name not in ("count", "calls"))

    @property
    def tokens(self) -> float:
        """`sum w_t` as a Python number (waits for the device)."""
        return float(self.count)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All sums, by name."""
        found = super().tensors()
        found |= {name: getattr(self, name) for name in ("fisher", "gradient") if getattr(self, name) is not None}
        for prefix, part in (("second", self.second), ("sketch", self.sketch)):
            if part is not None:
                found |= {f"{prefix}.{name}": value for name, value in part.tensors().items()}
        return found

    def to(self, device: torch.device) -> None:
        """Move the sums."""
        super().to(device)
        for name in ("fisher", "gradient"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name).to(device))
        for part in (self.second, self.sketch):
            if part is not None:
                part.to(device)

    def settings(self) -> dict[str, Any]:
        """The arguments that rebuild an empty one, but for the device and dtype."""
        return {
            "out_features": self.out_features,
            "in_features": self.in_features,
            "forms": self.forms,
            "sketch": self._sketch_settings,
        }
