"""`LoraDash`: where a run begins."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lora_kernels.training.dash.run import DashRun, begin
from lora_kernels.training.dash.settings import DashSettings


@dataclass(frozen=True)
class LoraDash(DashSettings):
    """LoRA-Dash (arXiv 2409.01035): train LoRA, then also train one coordinate each along task-specific directions.

    After `pre_launch` optimizer steps, per layer with base weight `W = U diag(sigma) V^T` and adapter `s B A`, the k
    core directions with the largest change rates `|u_i^T (s B A) v_i| / (sigma_i + eps)` are frozen, and
    `y += sum_i c_i u_i (v_i^T x)` is trained beside A and B. The coordinates start at zero, so that the function does
    not jump; they are not multiplied by s (so `set_scale` leaves them alone), and x is not dropped.

        run = lk.LoraDash(k=8).attach(model)      # before the optimizer, and before DDP or FSDP2
        for batch in loader:
            ...
            optimizer.step()
            run.step(optimizer)

    With transformers' Trainer: `callbacks=[lk.LoraDashCallback(lk.LoraDash(k=8))]`.

    Args:
        k: directions per layer.
        pre_launch: optimizer steps before the switch.
        epsilon: eps, in units of the largest singular value of W. It bounds what a direction gains from being one that
            W has nothing of.
        adapter_name: the adapter; by default the active one.
        cache_dir: folder for the decompositions of the base weights, or `None`. They do not depend on data:
            `run.prepare()` makes them before training. `TaskDirections(cache=...)` reads and writes the same files.

    Raises:
        TypeError: if a value is of a wrong type.
        ValueError: if one is out of range.
    """

    def attach(self, model: nn.Module) -> DashRun:
        """Give the layers of an adapter their coordinates, zero and without directions yet.

        Call it before the optimizer is made and before the model is wrapped in DDP or FSDP2, so that both know the
        parameters from the start. A model that has them (loaded by `lora_kernels.load`, say) is taken up where it
        stands.

        Args:
            model: a PEFT model with LoRA layers.

        Returns:
            The run; its `report()` names every layer, also those that have no core directions.

        Raises:
            TypeError: if the adapter's config is no plain `LoraConfig`.
            ValueError: if the model is wrapped, sharded or merged, has no such adapter or several active ones, no
                layer with k core directions, or coordinates of another number.
        """
        return begin(model, self)
