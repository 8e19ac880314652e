"""LoRA-Pro (arXiv 2407.18242) as a torch optimizer: LoRA pairs that follow the gradient of the full weight.

optimizer = lk.create_lora_pro_optimizer(peft_model, lr=1e-4)
optimizer = lk.training.LoraPro([{"pairs": [(A, B), ...], "scaling": 2.0}, {"params": head.parameters()}], lr=1e-4)
Trainer(..., optimizers=(optimizer, None))
Trainer(..., optimizer_cls_and_kwargs=lk.training.lora_pro_cls_and_kwargs(peft_model, lr=1e-4))
"""

from lora_kernels.training.lora_pro.model import create_lora_pro_optimizer, lora_pro_cls_and_kwargs
from lora_kernels.training.lora_pro.optimizer import LoraPro

__all__ = ["LoraPro", "create_lora_pro_optimizer", "lora_pro_cls_and_kwargs"]
