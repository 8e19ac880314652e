"""Accumulation of weight gradients and Fisher diagonals, `G += g^T diag(w) x` and `f += sum v g^2`."""
