"""Adapters that one version of PEFT writes and another reads: `peft_files.py write|read FOLDER ...`."""

import shutil
import sys
from pathlib import Path

import torch
from peft import PeftModel

import lora_kernels as lk
from tests.adapters.start_models import BATCHES, nudge, started, wrapped
from tests.statistics.models import tiny_llama

INPUT = BATCHES[0]["input_ids"]
PATTERNS = {
    "use_rslora": True, "rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}
}  # fmt: skip


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=INPUT).logits


def dashed():
    model = started("lora_ga")
    run = lk.LoraDash(k=3).attach(model)
    run.launch(torch.optim.SGD(model.parameters(), lr=0.1), progress=False)
    nudge(model)
    return model


def plain():
    model = wrapped()
    nudge(model)
    return model


MADE = {
    "plain": plain,
    "start": lambda: started("lora_ga"),
    "patterns": lambda: started("pissa", **PATTERNS),
    "coordinates": dashed,
    "ranks": lambda: started("eva"),
}


def write(folder):
    """Every kind of adapter, saved and exported, with its base weights and what it computes."""
    shutil.rmtree(folder, ignore_errors=True)
    for kind, make in MADE.items():
        model = make()
        model.save_pretrained(folder / kind / "saved")
        lk.export(model, folder / kind / "exported")
        torch.save(logits(model), folder / kind / "logits.pt")
    torch.save(tiny_llama().state_dict(), folder / "base.pt")  # the start of models differs between transformers


def read(folder):
    """Each of them, by stock PEFT and to be trained on."""
    base = torch.load(folder / "base.pt")
    for kind in MADE:
        expected = torch.load(folder / kind / "logits.pt")
        for load in (PeftModel.from_pretrained, lk.load):
            for file in ("saved", "exported"):
                model = tiny_llama()
                model.load_state_dict(base)
                untouched = logits(model)
                found = logits(load(model, folder / kind / file))
                assert (untouched - expected).abs().max() > 0.02, f"{folder / kind} does nothing"
                close = torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
                assert close, f"{folder / kind / file} is {(found - expected).abs().max()} off"


if __name__ == "__main__":
    for argument in sys.argv[2:]:
        {"write": write, "read": read}[sys.argv[1]](Path(argument))
