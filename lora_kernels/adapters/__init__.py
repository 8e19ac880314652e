"""What an adapter is: its parts in a LoRA layer, and its files."""
