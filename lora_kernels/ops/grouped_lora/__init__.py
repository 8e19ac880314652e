"""The low-rank part of many experts' linear layers, on rows that are sorted by expert."""
