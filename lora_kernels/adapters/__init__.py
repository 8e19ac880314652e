"""All that knows PEFT: LoRA layers, their base weights and parts, reading and writing adapters and their files."""
