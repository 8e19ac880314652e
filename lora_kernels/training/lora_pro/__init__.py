from lora_kernels.training.lora_pro.model import create_lorapro_optimizer, lorapro_cls_and_kwargs
from lora_kernels.training.lora_pro.optimizer import LoRAPro

__all__ = ["LoRAPro", "create_lorapro_optimizer", "lorapro_cls_and_kwargs"]
