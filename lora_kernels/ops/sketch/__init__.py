"""Random projections and their accumulation: sketches of second moments and of gradients."""

from lora_kernels.ops.sketch.op import project, sketch_

__all__ = ["project", "sketch_"]
