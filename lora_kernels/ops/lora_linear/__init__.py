"""A linear layer with a LoRA adapter, forward and backward."""
