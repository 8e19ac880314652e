"""Accumulation of weighted second moments, `C += X^T diag(w) X`."""
