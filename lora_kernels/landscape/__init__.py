"""What a trained adapter tells about the loss landscape it ended in (arXiv 2502.09376): pure functions."""

from lora_kernels.landscape.certificate import Certificate, certify
from lora_kernels.landscape.report import Diagnosis, ExpertsDiagnosis, LayerDiagnosis
from lora_kernels.landscape.spectra import Adapter, Spectrum, directions, factor_spectra, measure
from lora_kernels.landscape.verdict import Thresholds, Verdict, judge, overall
from lora_kernels.landscape.weights import Overlap, WeightNorms, leading_directions, overlap, weight_norms

__all__ = [
    "Adapter",
    "Certificate",
    "Diagnosis",
    "ExpertsDiagnosis",
    "LayerDiagnosis",
    "Overlap",
    "Spectrum",
    "Thresholds",
    "Verdict",
    "WeightNorms",
    "certify",
    "directions",
    "factor_spectra",
    "judge",
    "leading_directions",
    "measure",
    "overall",
    "overlap",
    "weight_norms",
]
