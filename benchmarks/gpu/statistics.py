"""Sums over tokens (covariance, gradient, sketch), and the skinny products of LoRA, against torch and their floors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.part import Run, relative_error
from benchmarks.rates import Floor
from lora_kernels import ops
from lora_kernels.ops._tiles import capability_of
from lora_kernels.ops.skinny import reference

TOKENS = 8192


def statistics(run: Run) -> None:
    """`covariance_`, `gradient_statistics_` and `sketch_` in bfloat16."""
    tokens = run.pick(TOKENS, 64)
    wide = run.pick(((4096, 4096), (14336, 4096), (4096, 14336)), ((48, 32),))
    cases = [{"op": "covariance_", "tokens": tokens, "n": n} for n in run.pick((4096, 11008, 14336), (48,))]
    cases += [{"op": "gradient_statistics_", "tokens": tokens, "m": m, "n": n} for m, n in wide]
    cases += [
        {"op": "sketch_", "tokens": tokens, "n": n, "k": k} for n in run.pick((4096, 14336), (48,)) for k in (32, 64)
    ]
    run.each(cases, _statistic)


def _statistic(run: Run, op: str, **sizes: int) -> dict[str, Any]:
    sides: dict[str, Callable[..., dict[str, Any]]]
    sides = {"covariance_": _covariance, "gradient_statistics_": _gradient, "sketch_": _sketch}
    return sides[op](run, **sizes)


def _after(call: Callable[[], Any], *results: torch.Tensor) -> list[torch.Tensor]:
    """What a call adds to results of zero."""
    for tensor in results:
        tensor.zero_()
    call()
    return [tensor.clone() for tensor in results]


def _library(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The library's product of 16-bit operands added to float32 `out` in place; nothing where torch has none."""

    def library() -> None:
        torch.ops.aten.addmm.dtype_out(out, left, right, torch.float32, out=out)

    try:
        library()
    except (AttributeError, RuntimeError) as error:
        print(f"  no product with float32 output here: {str(error).splitlines()[0][:150]}")
        return {}
    return {"library": library}


def _covariance(run: Run, tokens: int, n: int) -> dict[str, Any]:
    x = run.normal(tokens, n)
    out = torch.zeros(n, n, device=run.device)

    def torch_float32() -> None:
        wide = x.float()
        out.addmm_(wide.mT, wide)

    calls = {
        "ours": lambda: ops.covariance_(out, x),
        "torch": lambda: out.add_(x.mT @ x),
        "torch_float32": torch_float32,
        **_library(out, x.mT, x),
    }
    if run.device.type == "cuda":
        from lora_kernels.ops.covariance import kernel  # noqa: PLC0415

        config = kernel.config_for(n, x.dtype, capability=capability_of(x.device))
        calls["triton"] = lambda: kernel.covariance(out, x, config=config)
    truth = (x.double().mT @ x.double()).tril_()
    errors = {name: relative_error(_after(call, out)[0].tril_(), truth) for name, call in calls.items()}
    del truth
    # Half of a symmetric product, and half of a float32 matrix read and written.
    floor = Floor(float(tokens) * n * (n + 1), 2.0 * tokens * n + 4.0 * n * (n + 1), run.rates)
    return run.compare(calls, errors, floor=floor)


def _gradient(run: Run, tokens: int, m: int, n: int) -> dict[str, Any]:
    x, g = run.normal(tokens, n), run.normal(tokens, m)
    gradient, fisher = torch.zeros(m, n, device=run.device), torch.zeros(m, device=run.device)

    def narrow() -> None:
        gradient.add_(g.mT @ x)
        fisher.add_(g.float().square().sum(0))

    def torch_float32() -> None:
        wide = g.float()
        gradient.addmm_(wide.mT, x.float())
        fisher.add_(wide.square().sum(0))

    calls = {
        "ours": lambda: ops.gradient_statistics_(gradient, fisher, g, x),
        "torch": narrow,
        "torch_float32": torch_float32,
    }
    library = _library(gradient, g.mT, x).get("library")
    if library is not None:
        calls["library"] = lambda: (library(), fisher.add_(g.float().square().sum(0)))
    if run.device.type == "cuda":
        from lora_kernels.ops.gradient_statistics import kernel  # noqa: PLC0415

        config = kernel.config_for(m, n, x.dtype, weighted=False, capability=capability_of(x.device))

        def by_triton() -> None:
            kernel.gradient_statistics(gradient, g, x, None, None, config)
            ops.gradient_statistics_(None, fisher, g)

        calls["triton"] = by_triton
    truth = g.double().mT @ x.double(), g.double().square().sum(0)
    errors = {}
    for name, call in calls.items():
        values = _after(call, gradient, fisher)
        errors[name] = relative_error(values[0], truth[0])
        errors[f"{name} fisher"] = relative_error(values[1], truth[1])
    del truth
    floor = Floor(2.0 * tokens * m * n, 2.0 * tokens * (m + n) + 8.0 * m * (n + 1), run.rates)
    return run.compare(calls, errors, floor=floor)


def _sketch(run: Run, tokens: int, n: int, k: int) -> dict[str, Any]:
    x, out = run.normal(tokens, n), torch.zeros(n, k, device=run.device)
    omega = ops.random_matrix(n, k, seed=9).to(run.device)
    narrow = omega.to(x.dtype)

    def torch_float32() -> None:
        wide = x.float()
        out.addmm_(wide.mT, wide @ omega)

    calls = {
        "ours": lambda: ops.sketch_(out, x, x, seed=9),
        "torch": lambda: out.add_(x.mT @ (x @ narrow)),
        "torch_float32": torch_float32,
    }
    truth = x.double().mT @ (x.double() @ omega.double())
    errors = {name: relative_error(_after(call, out)[0], truth) for name, call in calls.items()}
    # x once; the products are taken in tf32 or bfloat16, of which the faster is the floor.
    floor = Floor(4.0 * tokens * n * k, 2.0 * tokens * n + 8.0 * n * k, run.rates)
    return run.compare(calls, errors, floor=floor)


def skinny(run: Run) -> None:
    """`shrink`, `tsreduce` and `expand`, which memory bounds: what share of the copy rate do they reach?"""
    tokens = run.pick(TOKENS, 64)
    run.each(
        [
            {"op": op, "tokens": tokens, "n": n, "rank": rank, "dropout": dropout}
            for n in run.pick((4096, 14336), (48,))
            for rank in run.pick((16, 64), (16,))
            for op in ("shrink", "tsreduce", "expand")
            for dropout in (0.0, 0.05)
        ],
        _skinny,
    )


def _skinny(run: Run, op: str, tokens: int, n: int, rank: int, dropout: float) -> dict[str, Any]:
    drop = ops.Dropout(dropout, 11) if dropout else None
    x, t, a = run.normal(tokens, n), run.normal(tokens, rank), run.normal(rank, n)
    mask = None if drop is None else reference.dropped(torch.ones_like(x), drop)

    def by_torch(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        if op == "expand":
            return one @ two if mask is None else (one @ two) * mask
        wide = x if mask is None else x * mask
        return wide @ two.mT if op == "shrink" else one.mT @ wide

    # The mask is given to torch: making one would cost it more.
    operands = {"shrink": (x, a), "tsreduce": (t, x), "expand": (t, a)}[op]
    calls = {
        "ours": lambda: getattr(ops, op)(*operands, dropout=drop),
        "torch": lambda: by_torch(*operands),
    }
    exact: Callable[..., torch.Tensor] = getattr(reference, op)
    truth = exact(*(operand.double() for operand in operands), dropout=drop)
    errors = {name: relative_error(call(), truth) for name, call in calls.items()}
    flops, moved = 2.0 * tokens * n * rank, 2.0 * (tokens * (n + rank) + rank * n)
    entry = run.compare(calls, errors, floor=Floor(flops, moved, run.rates))
    if "error" not in entry and run.rates is not None:
        entry["share_of_copy"] = moved / entry["seconds"]["ours"]["p50"] / run.rates.copy
    return entry
