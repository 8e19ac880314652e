"""Batched algebra on small dense matrices."""
