"""What `python -m benchmarks.compare` compares: one module, one `SUBJECT` each."""

from benchmarks.subject import Subject
from benchmarks.subjects import (
    claims,
    eva,
    experts,
    init,
    landscape,
    linear,
    llm,
    lora_pro,
    small_linalg,
    spectrum,
    statistics,
    svd,
    train,
)

SUBJECTS: dict[str, Subject] = {
    each.SUBJECT.name: each.SUBJECT
    for each in (
        eva,
        statistics,
        init,
        linear,
        experts,
        train,
        llm,
        lora_pro,
        svd,
        small_linalg,
        spectrum,
        landscape,
        claims,
    )
}
