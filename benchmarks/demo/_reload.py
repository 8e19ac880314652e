"""Loads an adapter with stock PEFT and computes logits. Run as a script in a process of its own; see roundtrip.py.

It imports nothing of this package: what it shows is that the saved folder needs nothing but PEFT.
"""

import json
import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification


def main(job: dict[str, str | int]) -> None:
    """Loads base model and adapter, runs the stored inputs and stores the logits.

    Args:
        job: Paths `base`, `adapter`, `inputs`, `outputs`, and the numbers `classes`, `threads` and `pad_token_id`.
    """
    torch.set_num_threads(int(job["threads"]))
    base = AutoModelForSequenceClassification.from_pretrained(
        job["base"], num_labels=int(job["classes"]), ignore_mismatched_sizes=True, local_files_only=True
    ).float()
    if base.config.pad_token_id is None:
        base.config.pad_token_id = int(job["pad_token_id"])
    model = PeftModel.from_pretrained(base, job["adapter"]).eval()
    inputs = load_file(job["inputs"])
    with torch.no_grad():
        logits = model(**inputs).logits
    foreign = torch.tensor([any(name.split(".")[0] == "lora_kernels" for name in sys.modules)])
    save_file({"logits": logits.contiguous(), "saw_lora_kernels": foreign}, job["outputs"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
