"""The demo: fine-tune a small encoder from random and from data-aware LoRA factors and compare the two runs."""

from benchmarks.demo.config import DEFAULT_RATES, DemoConfig

__all__ = ["DEFAULT_RATES", "DemoConfig"]
