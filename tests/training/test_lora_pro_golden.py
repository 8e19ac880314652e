"""`full` mode against the papers' own code, run on the CPU (tests/golden/lora_pro_full.json)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lora_kernels as lk
from tests.conftest import relative_error

STEPS, LAYERS = 6, 3
# The authors' code multiplies its damping into a float32 identity.
DAMPING = float(np.float32(1e-8))


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parents[1] / "golden" / "lora_pro_full.safetensors")


def run(golden, trajectory, lr, truth_of=None, **options):
    """All six steps, from the golden gradients of the full weights; errors by name, beside another trajectory."""
    dtype = torch.float64 if trajectory.endswith("f64") else torch.float32
    pairs = [tuple(torch.nn.Parameter(golden[f"layer{k}.{name}0"].to(dtype)) for name in "AB") for k in range(LAYERS)]
    options = {"mode": "full", "damping": DAMPING, **options}
    optimizer = lk.training.LoraPro([{"pairs": pairs, "scaling": 2.0}], lr=lr, **options)
    errors = {}

    def compare(key, found):
        name = key.rpartition(".")[2]
        key = f"{truth_of or trajectory}.{key}"
        if key in golden:
            truth = golden[key]
            wrong = float(found.abs().max()) if not truth.any() else relative_error(found, truth)
            errors[name] = max(errors.get(name, 0.0), wrong)

    for step in range(STEPS):
        before = []
        for k, (a, b) in enumerate(pairs):
            g = golden[f"layer{k}.step{step}.G"].to(dtype)
            a.grad, b.grad = 2.0 * b.detach().T @ g, 2.0 * g @ a.detach().T
            before.append((a.detach().clone(), b.detach().clone()))
            for name, value in zip(("A", "B", "gA", "gB"), (a, b, a.grad, b.grad), strict=True):
                compare(f"layer{k}.step{step}.{name}", value.detach())
        optimizer.step()
        for k, ((a, b), (old_a, old_b)) in enumerate(zip(pairs, before, strict=True)):
            state = optimizer.state[b]
            compare(f"layer{k}.step{step}.m1", state["exp_avg"])
            compare(f"layer{k}.step{step}.m2", state["exp_avg_sq"])
            compare(f"layer{k}.step{step}.adjA", (old_a - a.detach()) / lr)
            compare(f"layer{k}.step{step}.adjB", (old_b - b.detach()) / lr)
    for k, (a, b) in enumerate(pairs):
        compare(f"layer{k}.final.A", a.detach())
        compare(f"layer{k}.final.B", b.detach())
    return errors


@pytest.mark.parametrize(("trajectory", "lr"), [("nobf16_fromzero.f64", 0.05), ("nobf16_smalllr_fromzero.f64", 2e-5)])
def test_float64_trajectories(golden, trajectory, lr):
    errors = run(golden, trajectory, lr)
    assert {"A", "B", "gA", "gB", "adjA", "adjB", "m1", "m2"} <= errors.keys()
    for name, error in errors.items():
        assert error < 1e-10, (name, error)


def test_float32_trajectory(golden):
    """At most twice as far from their float64 trajectory as their own float32."""
    mine, theirs = "nobf16_fromzero.f32", "nobf16_fromzero.f64"
    own = {}
    for key, value in golden.items():
        if key.startswith(mine) and golden[key.replace(mine, theirs)].any():
            name = key.rpartition(".")[2]
            own[name] = max(own.get(name, 0.0), relative_error(value, golden[key.replace(mine, theirs)]))
    for name, error in run(golden, mine, 0.05, theirs).items():
        assert error <= 2 * own[name] < 1e-5, (name, error)


def test_the_damping_is_in_the_two_inverses_and_counts(golden):
    assert run(golden, "nobf16_smalllr_fromzero.f64", 2e-5, damping=0.0)["adjB"] > 0.1
