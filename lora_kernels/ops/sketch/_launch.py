"""Launches of the sketch kernels: Omega, chunks of tokens, parts of the features."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_kernels.ops import _tiles
from lora_kernels.ops._backend import interpreting
from lora_kernels.ops._reduce import column_sums
from lora_kernels.ops._tiles import build_platform, precision, processors
from lora_kernels.ops.random_matrix import kernel as random_kernel
from lora_kernels.ops.sketch.kernel import (
    ROWS,
    SketchConfig,
    add_kernel,
    combine_kernel,
    config_for,
    is_aligned,
    rank_for,
    shrink_kernel,
    tall_kernel,
)

# Second-level cache assumed where the device does not tell; half of it is for the rows of a chunk.
_CACHE = 40 * 2**20
_MOST_TOKENS = 2**20


@dataclass(frozen=True)
class Omega:
    """What Omega is, and its draws where they are kept.

    Attributes:
        columns: k.
        kind: `rademacher` or `gaussian`.
        seed: 64-bit key.
        stream: which matrix.
        scratch: `(1 or 2, q, padded k)` of the rows' dtype; `None` where the kernel makes it.
    """

    columns: int
    kind: str
    seed: int
    stream: int
    scratch: torch.Tensor | None


def make_omega(x: torch.Tensor, columns: int, kind: str, seed: int, stream: int) -> Omega:
    """Draw what cannot be made inside the kernel.

    Args:
        x: `(rows, q)`, whose device and dtype Omega meets.
        columns: k.
        kind: `rademacher` or `gaussian`.
        seed: 64-bit key.
        stream: which matrix.

    Returns:
        The matrix.
    """
    scratch = None
    if kind == "gaussian":
        rank, blocks = rank_for(columns)
        parts = (2,) if x.dtype != torch.float32 else ()  # 16-bit rows meet a rounded part and the rest
        scratch = torch.empty(*parts, x.shape[1], blocks * rank, dtype=x.dtype, device=x.device)
        random_kernel.random_matrix(scratch, kind, seed, stream, 0)
    return Omega(columns, kind, seed, stream, scratch)


def _shrink(
    out: torch.Tensor,
    x: torch.Tensor,
    index: torch.Tensor | None,
    weight: torch.Tensor | None,
    omega: Omega,
    config: SketchConfig | None,
    least_features: int,
) -> None:
    """Fill `out`: `(tokens, k)` or `(tokens, padded k)` float32, or `(tokens, 2 * padded k)` for a pair."""
    tokens, features = x.shape[0] if index is None else index.shape[0], x.shape[1]
    config = config or config_for("shrink", x.dtype, aligned=is_aligned(x))
    rank, blocks = rank_for(omega.columns)
    pair = out.dtype != torch.float32
    tall = -(-tokens // config.tokens)
    splits = _tiles.token_splits(blocks * tall, features, processors(x.device), least=least_features)
    steps = -(-features // (splits * config.features))  # no part but the last has a ragged end
    splits = -(-features // (steps * config.features))
    direct = splits == 1 and weight is None and not pair
    target = out
    if not direct:
        target = torch.empty(splits, tokens, blocks * rank, dtype=torch.float32, device=x.device)
    shrink_kernel[(blocks, tall, splits)](
        target,
        # A pointer that a flag switches off must still be one.
        x,
        x if index is None else index,
        x if omega.scratch is None else omega.scratch,
        features,
        tokens,
        target.shape[-1],
        steps,
        x.stride(0),
        target.stride(-2),
        random_kernel.signed32(omega.seed),
        random_kernel.signed32(omega.seed >> 32),
        random_kernel.signed32(omega.stream),
        TOKENS=config.tokens,
        FEATURES=config.features,
        RANK=rank,
        HAS_INDEX=index is not None,
        SIGNS=omega.scratch is None,
        PAIR=omega.scratch is not None and omega.scratch.dim() == 3,
        PRECISION=precision(x.dtype, build_platform()),
        UPCAST=interpreting(),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if not direct:
        combine_kernel[(blocks, -(-tokens // ROWS))](
            out, target, target if weight is None else weight, tokens, splits,
            blocks * rank if pair else out.shape[1], out.stride(0),
            ROWS=ROWS, RANK=rank, HAS_WEIGHT=weight is not None, PAIR=pair,
        )  # fmt: skip


def _add_tall(
    out: torch.Tensor,
    x: torch.Tensor,
    index: torch.Tensor | None,
    p: torch.Tensor,
    config: SketchConfig | None,
    least_tokens: int,
) -> None:
    """`out += x^T P`, P as `_shrink` left it."""
    tokens, features = p.shape[0], x.shape[1]
    config = config or config_for("tall", x.dtype, aligned=is_aligned(x))
    rank, blocks = rank_for(out.shape[1])
    tiles = -(-features // config.features)
    splits = _tiles.token_splits(blocks * tiles, tokens, processors(x.device), least=least_tokens)
    chunk = -(-tokens // splits)
    if splits > 1:
        chunk = -(-chunk // config.tokens) * config.tokens
    splits = -(-tokens // chunk)
    partial = torch.empty(splits, features, blocks * rank, dtype=torch.float32, device=x.device)
    tall_kernel[(blocks, tiles, splits)](
        partial,
        x,
        x if index is None else index,
        p,
        features,
        tokens,
        chunk,
        x.stride(0),
        TOKENS=config.tokens,
        FEATURES=config.features,
        RANK=rank,
        HAS_INDEX=index is not None,
        PAIR=p.dtype != torch.float32,
        PRECISION=precision(p.dtype, build_platform()),
        UPCAST=interpreting(),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    add_kernel[(blocks, -(-features // ROWS))](
        out, partial, features, out.shape[1], splits, out.stride(0), ROWS=ROWS, RANK=rank
    )


def token_chunk(tokens: int, row_bytes: int, cache: int) -> int:
    """How many tokens go through both kernels at a time: half the cache holds their rows.

    Args:
        tokens: all of them.
        row_bytes: of a row.
        cache: bytes of the second-level cache.

    Returns:
        Tokens per chunk, in whole tiles; about the same for all chunks.
    """
    parts = -(-tokens * row_bytes // max(cache // 2, 2**24))
    return max(-(-tokens // (max(parts, 1) * 64)) * 64, 64)


def _cache_bytes(device: torch.device) -> int:
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return int(getattr(properties, "L2_cache_size", 0)) or _CACHE


def sketch(
    out: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    index: torch.Tensor | None,
    weight: torch.Tensor | None,
    column_sum: torch.Tensor | None,
    *,
    kind: str,
    seed: int,
    stream: int,
    configs: tuple[SketchConfig | None, SketchConfig | None] = (None, None),
    chunk: int | None = None,
    least: int = 256,
) -> None:
    """Launch the kernels.

    Args:
        out: `(p, k)` float32 with unit column stride.
        left: `(rows, p)` with unit column stride.
        right: `(rows, q)` with unit column stride; the same object as `left` for an input sketch.
        index: `(tokens,)` int64 rows that count, or `None` for all.
        weight: `(tokens,)` float32, or `None`.
        column_sum: `(p,)` float32 contiguous, or `None`.
        kind: `rademacher` or `gaussian`.
        seed: 64-bit key.
        stream: which matrix.
        configs: tile sizes of both products; `config_for` by default.
        chunk: tokens per chunk; by default from the cache.
        least: tokens or features that a split has at least.
    """
    tokens = left.shape[0] if index is None else index.shape[0]
    if tokens == 0 or left.shape[1] == 0:
        return
    # Without columns, or rows that hold anything, only the sum is left.
    omega = make_omega(right, out.shape[1], kind, seed, stream) if out.shape[1] and right.shape[1] else None
    if chunk is None:
        chunk = _MOST_TOKENS
        if left is right:  # else nothing is read twice
            chunk = token_chunk(tokens, left.stride(0) * left.element_size(), _cache_bytes(left.device))
    rank, blocks = rank_for(out.shape[1])
    pair = left.dtype == torch.bfloat16
    for low in range(0, tokens, chunk):
        part = slice(low, min(low + chunk, tokens))
        picked = None if index is None else index[part]
        weights = None if weight is None else weight[part]
        one = left[part] if index is None else left
        if omega is not None:
            two = one if left is right else right[part] if index is None else right
            p = torch.empty(
                part.stop - low,
                blocks * rank * (2 if pair else 1),
                dtype=torch.bfloat16 if pair else torch.float32,
                device=left.device,
            )
            _shrink(p, two, picked, weights, omega, configs[0], 2 * least)
            _add_tall(out, one, picked, p, configs[1], least)
        if column_sum is not None:
            column_sums(column_sum, one, picked, weights)


def project(
    out: torch.Tensor,
    a: torch.Tensor,
    *,
    kind: str,
    seed: int,
    stream: int,
    config: SketchConfig | None = None,
    least: int = 512,
) -> None:
    """Launch the first product alone.

    Args:
        out: `(rows, k)` contiguous float32, filled.
        a: `(rows, q)` with unit column stride, q at least 1.
        kind: `rademacher` or `gaussian`.
        seed: 64-bit key.
        stream: which matrix.
        config: tile sizes; `config_for` by default.
        least: features that a split has at least.
    """
    if out.numel() == 0:
        return
    omega = make_omega(a, out.shape[1], kind, seed, stream)
    for low in range(0, a.shape[0], _MOST_TOKENS):
        part = slice(low, low + _MOST_TOKENS)
        _shrink(out[part], a[part], None, None, omega, config, least)
