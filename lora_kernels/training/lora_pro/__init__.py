"""LoRA-Pro (arXiv 2407.18242) as a torch optimizer: LoRA pairs that follow the gradient of the full weight.

    optimizer = lk.create_lora_pro_optimizer(peft_model, lr=1e-4)                  # pairs found, scaling per layer
    optimizer = lk.LoraPro([{"pairs": [(A, B), ...], "scaling": 2.0}, {"params": head.parameters()}], lr=1e-4)
    Trainer(..., optimizers=(optimizer, None))
    Trainer(..., optimizer_cls_and_kwargs=lk.lora_pro_cls_and_kwargs(peft_model, lr=1e-4))

A step on A and B moves `W + s B A` by `E = s B dA + s dB A`, to first order. Of all `(dA, dB)`, LoRA-Pro takes those
for which E is closest to the gradient of the full weight; they have a closed form in A, B and the gradients that
autograd gives for A and B (`adjustment.py`).

Two modes. `efficient`: AdamW on the adjusted gradients; its state is the state of AdamW on A and B. `full`, the paper's
algorithm: Adam's moments are kept for E, two m x n matrices per pair, and Adam's direction H takes the place of the
gradient: `gA <- s B^T H`, `gB <- s H A^T`, then the adjustment, then `p <- p - lr adjusted`. E and H exist tile by tile
only, inside of one op (`lora_kernels.ops.lora_pro_adam_`); `state_dtype=torch.bfloat16` halves the moments again.

What differs from the authors' code: steps are counted from 1, so that Adam's first bias correction is right; the
second moment takes E as it is, without a rounding to bfloat16; the scaling is that of the layer, not 2; and while B = 0
(decided on the values of B, layer by layer) the inverse of `B^T B` is not taken.

What to know:
- Order within a step: accumulate, unscale, clip, `step`. Clipping acts on the gradients of A and B, before the
  adjustment.
- A pair whose factors both lack a gradient is skipped (an expert that saw no token); where only one of them has one,
  `step` raises. A factor whose partner is frozen is no pair: in PEFT models it gets AdamW.
- The damping `1e-8` is added to the eigenvalues of `B^T B` and `A A^T`. Directions in which a factor has lost its rank
  (B with fewer rows than the rank, say) get no update through its inverse: the gradients there are rounding errors.
- Everything r x r is done in float64 in batches over all pairs of one rank; nothing of size m x m or m x n is formed
  outside of the moments.
- State is keyed by parameter, as torch's optimizers do: `step`, `exp_avg`, `exp_avg_sq`; in `full` mode those of B are
  the moments of the full weight, `(m, n)`, and A has `step` alone. A run that is resumed from `state_dict` goes on to
  the same bits. The scaling is no state: it comes from the layers or from the constructor.
- Processes: see `LoraPro`. FSDP1 (flattened parameters) and DeepSpeed's own optimizers cannot hold pairs.
"""

from lora_kernels.training.lora_pro.model import create_lora_pro_optimizer, lora_pro_cls_and_kwargs
from lora_kernels.training.lora_pro.optimizer import LoraPro

__all__ = ["LoraPro", "create_lora_pro_optimizer", "lora_pro_cls_and_kwargs"]
