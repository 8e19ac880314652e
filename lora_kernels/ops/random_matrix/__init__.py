"""Matrices of random numbers that are addressed, never stored."""
