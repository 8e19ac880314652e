"""The products in plain torch, one expert after another. Every function fills what it is given; see `kernel.py`."""

from __future__ import annotations

import torch

from lora_kernels.ops._dropout import Mask


def _kept(x: torch.Tensor, rows: slice, mask: Mask | None) -> torch.Tensor:
    return x[rows] if mask is None else torch.where(mask.keep(rows, x.shape[1], x.device), x[rows], 0)


def _groups(bounds: list[int]) -> list[tuple[int, slice]]:
    pairs = enumerate(zip(bounds[:-1], bounds[1:], strict=True))
    return [(expert, slice(first, last)) for expert, (first, last) in pairs if first < last]


def shrink(
    out: torch.Tensor, x: torch.Tensor, bounds: list[int], factor: torch.Tensor, scale: float, mask: Mask | None
) -> None:
    """`out = scale * drop(x) factor^T`: `(rows, n)` and `(experts, r, n)` give `(rows, r)`."""
    scale *= 1.0 if mask is None else mask.factor
    for expert, rows in _groups(bounds):
        out[rows].addmm_(_kept(x, rows, mask), factor[expert].mT, beta=0, alpha=scale)
    out[bounds[-1] :].zero_()


def reduce(out: torch.Tensor, t: torch.Tensor, z: torch.Tensor, bounds: list[int], mask: Mask | None) -> Mask | None:
    """`out = t^T drop(z)` of each expert's rows: `(rows, r)` and `(rows, d)` give `(experts, r, d)`; the mask again."""
    wide, factor = torch.promote_types(z.dtype, torch.float32), 1.0 if mask is None else mask.factor
    out.zero_()
    for expert, rows in _groups(bounds):
        out[expert] = factor * torch.mm(t[rows].to(wide).mT, _kept(z, rows, mask).to(wide))
    return mask


def expand(
    out: torch.Tensor,
    t: torch.Tensor,
    bounds: list[int],
    factor: torch.Tensor,
    base: torch.Tensor | None,
    mask: Mask | None,
) -> None:
    """`out = base + drop(t factor)`: `(rows, r)` and `(experts, r, d)` give `(rows, d)`; no base is zero."""
    wide = torch.promote_types(out.dtype, torch.float32)
    for expert, rows in _groups(bounds):
        if mask is None and base is not None:
            torch.addmm(base[rows], t[rows], factor[expert], out=out[rows])
        elif mask is None:
            torch.mm(t[rows], factor[expert], out=out[rows])
        else:
            delta = torch.mm(t[rows].to(wide), factor[expert].to(wide)).mul_(mask.factor)
            delta.masked_fill_(~mask.keep(rows, out.shape[1], out.device), 0)
            out[rows] = delta if base is None else delta + base[rows]
    tail = slice(bounds[-1], None)
    out[tail] = 0 if base is None else base[tail]
