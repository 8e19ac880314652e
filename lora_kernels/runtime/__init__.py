"""Processes, modes of a model, batches on their way to it, and its loss."""
