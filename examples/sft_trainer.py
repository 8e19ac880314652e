"""TRL's SFTTrainer: prompts and completions, of which only the completions count, in the start as in training.

    pip install trl
    python examples/sft_trainer.py

For your own model: `AutoModelForCausalLM.from_pretrained(...)`, its tokenizer, your dataset. `lk.initialize` reads what
the trainer reads: its own data loader, with the labels that it makes.
"""

import importlib.util
import sys

if importlib.util.find_spec("trl") is None:
    print("this example needs TRL: pip install trl")
    sys.exit(0)

import tempfile

import torch
from datasets import Dataset  # TRL brings it along
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import SFTConfig, SFTTrainer

import lora_kernels as lk

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", "after", "comes", *WORDS])}
words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right"
)
data = Dataset.from_list(
    [{"prompt": f"after {a} comes", "completion": f" {b}"} for a, b in zip(WORDS, WORDS[1:], strict=False)] * 32
)

torch.manual_seed(0)
size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(
    LlamaConfig(vocab_size=len(vocabulary), initializer_range=0.1, pad_token_id=0, eos_token_id=1, **size)
)
model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))

with tempfile.TemporaryDirectory() as folder:
    arguments = SFTConfig(
        folder,
        max_steps=40,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = SFTTrainer(
        model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[lk.api.LandscapeCallback(every=20)]
    )
    # The trainer makes its optimizer when training begins: until then the start may change ranks and parameters.
    # mask="labels" counts only the tokens that the loss counts.
    loader = trainer.get_train_dataloader()
    print(lk.initialize(model, loader, method="eva", mask="labels", max_batches=8, progress=False).summary())
    print(lk.accelerate(model).summary())
    trainer.remove_callback(PrinterCallback)  # what matters is printed below
    trainer.train()

losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")
