"""Products with a skinny factor, bound by memory: the primitives of a LoRA layer."""
