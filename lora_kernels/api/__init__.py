"""The user's entry points: where the maths meets models."""
