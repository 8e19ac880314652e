"""Claims of the papers, measured in small: cases of `python -m benchmarks.compare claims`.

equivalent: how near the step of LoRA-Pro comes to the gradient of the full weight (arXiv 2407.18242).
directions: whether LoRA-Dash selects the directions that full fine-tuning changes most (arXiv 2409.01035).
ends: which ends of training are of low rank, and which are minima (arXiv 2502.09376).

What a start costs is read from the record of a rate study (`costs`).
"""
