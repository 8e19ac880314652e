"""Load an adapter with stock PEFT and store its logits: a script for a process of its own, see roundtrip.py.

It imports nothing of lora_kernels, since what it shows is that the saved folder needs nothing but PEFT.
"""

import json
import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

job = json.loads(sys.argv[1])
torch.set_num_threads(job["threads"])
base = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32, local_files_only=True)
model = PeftModel.from_pretrained(base, job["adapter"]).eval()
with torch.no_grad():
    logits = model(**load_file(job["inputs"])).logits
imported = torch.tensor(any(name.split(".")[0] == "lora_kernels" for name in sys.modules))
save_file({"logits": logits.contiguous(), "imported_lora_kernels": imported}, job["outputs"])
