"""How a run trains what it has initialised: the optimizer, and what goes along with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lora_kernels.training.dash import DashRun

OPTIMIZERS = ("adamw", "lora_pro", "lora_pro_efficient")


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        optimizer: `adamw`, or LoRA-Pro in its `full` or its `efficient` mode; none with weight decay. The head is
            AdamW's in all cases.
        dash: after which share of the steps LoRA-Dash takes its directions; None for plain LoRA.
        directions: how many of them.
    """

    optimizer: str = "adamw"
    dash: float | None = None
    directions: int = 8

    def attach(self, model: Any, steps: int) -> DashRun | None:
        """Gives the model what is trained besides its adapter.

        Args:
            model: A `PeftModel`.
            steps: Length of the run.

        Returns:
            The run of LoRA-Dash, or None.
        """
        if self.dash is None:
            return None
        # Imported here: reading data and reports needs none of the kernels.
        from lora_kernels import LoraDash

        return LoraDash(k=self.directions, pre_launch=max(1, round(self.dash * steps))).attach(model)

    def make(self, model: Any, adapter_rate: float, head_rate: float) -> torch.optim.Optimizer:
        """Makes the optimizer.

        Args:
            model: A `PeftModel` as made by `build_model`.
            adapter_rate: Peak rate of the adapter.
            head_rate: Peak rate of the head.

        Returns:
            It.
        """
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameter_groups(model, adapter_rate, head_rate), weight_decay=0.0)
        from lora_kernels import create_lora_pro_optimizer

        mode = "full" if self.optimizer == "lora_pro" else "efficient"
        optimizer: torch.optim.Optimizer = create_lora_pro_optimizer(model, lr=adapter_rate, mode=mode)
        head = {id(parameter) for parameter in parameter_groups(model, adapter_rate, head_rate)[1]["params"]}
        for group in optimizer.param_groups:
            if all(id(parameter) in head for parameter in group["params"]):
                group["lr"] = head_rate
        return optimizer


PLAIN = Recipe()


def parameter_groups(model: Any, adapter_rate: float, head_rate: float) -> list[dict[str, Any]]:
    """Sorts what is trained into the optimizer's groups.

    Args:
        model: A `PeftModel` as made by `build_model`.
        adapter_rate: Peak rate of the LoRA factors.
        head_rate: Peak rate of the head.

    Returns:
        Two groups: the factors, and the head.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    head = [parameter for name, parameter in trained if ".modules_to_save." in name]
    factors = [parameter for name, parameter in trained if ".modules_to_save." not in name]
    return [{"params": factors, "lr": adapter_rate}, {"params": head, "lr": head_rate}]
