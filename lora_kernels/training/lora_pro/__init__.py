"""LoRA-Pro (arXiv 2407.18242) as a torch optimizer: LoRA pairs that follow the gradient of the full weight.

    optimizer = lk.create_lora_pro_optimizer(peft_model, lr=1e-4)
    optimizer = lk.training.LoraPro([{"pairs": [(A, B), ...], "scaling": 2.0}, {"params": head.parameters()}], lr=1e-4)
    Trainer(..., optimizers=(optimizer, None))
    Trainer(..., optimizer_cls_and_kwargs=lk.training.lora_pro_cls_and_kwargs(peft_model, lr=1e-4))

A step on A and B moves `W + s B A` by `E = s B dA + s dB A`, to first order. Of all `(dA, dB)`, LoRA-Pro takes those
for which E is closest to the gradient of the full weight; they have a closed form in A, B and the gradients that
autograd gives for A and B (`adjustment.py`).

Two modes. `efficient`: AdamW on the adjusted gradients; its state is the state of AdamW on A and B. `full`, the paper's
algorithm: Adam's moments are kept for E, two m x n matrices per pair, and Adam's direction H takes the place of the
gradient: `gA <- s B^T H`, `gB <- s H A^T`, then the adjustment, then `p <- p - lr adjusted`. E and H exist tile by tile
only, inside of one op (`lora_kernels.ops.lora_pro_adam_`); `state_dtype=torch.bfloat16` halves the moments again.

See docs/methods/lora_pro.md for the differences from the authors' code, and `LoraPro` for what it does with clipping,
states and several processes.
"""

from lora_kernels.training.lora_pro.model import create_lora_pro_optimizer, lora_pro_cls_and_kwargs
from lora_kernels.training.lora_pro.optimizer import LoraPro

__all__ = ["LoraPro", "create_lora_pro_optimizer", "lora_pro_cls_and_kwargs"]
