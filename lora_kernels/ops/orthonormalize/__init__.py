"""Orthonormal bases of tall matrices."""
