"""Batched small linear algebra, spectra of adapters, and LoRA-Pro's pass over its moments."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.part import Run, relative_error
from benchmarks.rates import Floor
from benchmarks.subjects import small_linalg
from lora_kernels.ops import lora_pro_adam_
from lora_kernels.ops.lora_pro_adam import reference

MATRICES, ADAPTERS = 500, 224
BETAS, EPS, SCALING, STEP = (0.9, 0.999), 1e-8, 2.0, 3


def solvers(run: Run) -> None:
    """Against what a user would write in torch (see `subjects.small_linalg`); by the clock, since torch waits."""
    orders, batch = run.pick((16, 64), (4, 8)), run.pick(MATRICES, 6)
    cases = [
        {"op": op, "order": order, "dtype": str(dtype).removeprefix("torch."), "batch": count}
        for dtype in (torch.float32, torch.float64)
        for op, count in (("eigh", batch), ("factor_spectrum", run.pick(ADAPTERS, 4)), ("sylvester", batch))
        for order in orders
    ]
    run.each([*cases, *({**case, "op": "cholesky_solve"} for case in cases if case["op"] == "sylvester")], _solver)


def _solver(run: Run, op: str, order: int, dtype: str, batch: int) -> dict[str, Any]:
    kind = getattr(torch, dtype)
    problem = small_linalg.case(op, order, kind, batch, run.device)
    calls = {"ours": lambda: problem.ours("auto"), "torch": problem.torch}
    if run.device.type == "cuda":
        calls["ours_cuda"] = lambda: problem.ours("cpp")
    answers, refused = {}, {}
    for name, call in list(calls.items()):
        try:
            answers[name] = call()
        except RuntimeError as error:
            if name != "ours_cuda":  # what `auto` chooses must run
                raise
            del calls[name]
            refused[name] = str(error)[:300]
    largest = problem.truth.abs().max()
    errors = {name: float((answer.double() - problem.truth).abs().max() / largest) for name, answer in answers.items()}
    errors["allowed"] = small_linalg.BOUNDS[kind]
    return {**run.compare(calls, errors, judge="allowed", wall=True, limit=1.0, rounding=0.0), "refused": refused}


def lora_pro(run: Run) -> None:
    """`lora_pro_adam_` as a share of what a copy moves, with moments in float32 and bfloat16."""
    shapes = run.pick(((4096, 4096), (4096, 14336), (14336, 4096)), ((48, 64),))
    run.each(
        [
            {"m": m, "n": n, "rank": rank, "moments": moments}
            for rank in run.pick((16, 64), (16,))
            for m, n in shapes
            for moments in ("float32", "bfloat16")
        ],
        _lora_pro,
    )
    shares = [entry["share_of_copy"] for entry in run.record["entries"] if "share_of_copy" in entry]
    if shares:
        run.record["note"] = f"{min(shares):.2f} to {max(shares):.2f} of the copy rate"


def _lora_pro(run: Run, m: int, n: int, rank: int, moments: str) -> dict[str, Any]:
    kind = getattr(torch, moments)
    one = run.normal(m, n, dtype=kind, scale=0.1)
    two = run.normal(m, n, dtype=torch.float32).square_().mul_(0.01).to(kind)
    a, b = run.normal(rank, n, dtype=torch.float32, scale=n**-0.5), run.normal(m, rank, dtype=torch.float32, scale=0.1)
    grads = run.normal(rank, n, dtype=torch.float32), run.normal(m, rank, dtype=torch.float32)
    numbers: dict[str, Any] = {"scaling": SCALING, "betas": BETAS, "eps": EPS, "step": STEP}
    seed = 5 if kind == torch.bfloat16 else None

    def step(backend: str, avg: torch.Tensor = one, square: torch.Tensor = two) -> list[torch.Tensor]:
        return [avg, square, *lora_pro_adam_(avg, square, a, b, *grads, **numbers, seed=seed, backend=backend)]

    truth = reference.lora_pro_adam(one, two, a, b, *grads, **numbers)
    errors = {}
    for name, backend in (("ours", "auto"), ("torch", "torch")):
        after = step(backend, one.clone(), two.clone())
        errors[name] = max(relative_error(value, exact) for value, exact in zip(after, truth, strict=True))
        # Rounded moments differ by a whole last digit; what the factors get does not, and tells more.
        errors[f"{name} factors"] = max(
            relative_error(value, exact) for value, exact in zip(after[2:], truth[2:], strict=True)
        )
    if not errors["ours factors"] <= 2 * errors["torch factors"] + 2e-6:
        return {"errors": errors, "error": f"wrong numbers: {errors}"}
    errors.pop("ours factors"), errors.pop("torch factors")
    del truth

    def eager() -> None:
        """The same step in torch, operations in place, E and H stored."""
        e = torch.mm(torch.cat((SCALING * b, SCALING * grads[1]), 1), torch.cat((grads[0], a)))
        one.mul_(BETAS[0]).add_(e, alpha=1 - BETAS[0])
        two.mul_(BETAS[1]).addcmul_(e.to(kind), e.to(kind), value=1 - BETAS[1])
        root = (two.float() * (1 - BETAS[1] ** STEP) ** -1).sqrt_().add_(EPS)
        h = (one.float() / root).mul_(SCALING / (1 - BETAS[0] ** STEP))
        b.mT @ h, h @ a.mT

    copied = torch.empty_like(one)
    calls = {
        "ours": lambda: step("auto"),
        "eager": eager,
        "copy_twice": lambda: (copied.copy_(one), copied.copy_(two)),  # the bytes of the moments, read and written
    }
    moved = 4.0 * m * n * kind.itemsize + 8.0 * rank * (m + n) + 8.0 * rank * (m + n)
    floor = Floor(8.0 * rank * m * n, moved, run.rates, "tf32")
    entry = run.compare(calls, errors, floor=floor)
    if "error" not in entry and run.rates is not None:
        entry["share_of_copy"] = moved / entry["seconds"]["ours"]["p50"] / run.rates.copy
    return entry
