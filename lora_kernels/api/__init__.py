"""Floor 5: where the maths meets models: finding layers, writing factors, the user's entry points."""
