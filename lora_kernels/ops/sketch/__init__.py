"""Random projections and their accumulation: sketches of second moments and of gradients."""
