"""The spectra of a whole model's adapters, against singular values of the products."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks import records
from benchmarks.rates import Floor, here
from benchmarks.subject import Row, Subject
from lora_kernels.landscape import factor_spectra

# A model of 32 blocks of 7 layers; the last quarter of each adapter's directions is zero.
LAYERS, FEATURES, ADAPTER_RANK = 224, 4096, 16
BOUND, FLOOR, TARGET = 1e-5, 1e-4, 500.0


def graded_factors(layers: int, features: int, rank: int, nonzero: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Factors whose products have `nonzero` singular values over about 4 decades, in float32."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.cat((torch.logspace(0, -3.5, nonzero), torch.zeros(rank - nonzero)))
    pairs = []
    for _ in range(layers):
        a, b = (torch.randn(*size, generator=generator) for size in ((rank, features), (features, rank)))
        mix = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
        # (B D mix^T)(mix A) = B D A: the zero directions lie across the columns of both.
        pairs.append((mix @ a, (b * shares) @ mix.mT))
    return pairs


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The spectra of all adapters at once against `svdvals` of the products of some, in turn.

    Each round times one product's singular values and all spectra. The products of the other layers are not
    decomposed: the ratio is time per layer, of one layer against the mean of all.

    Args:
        options: of the command line; the rounds are the layers whose products are decomposed.

    Returns:
        The entry.

    Raises:
        SystemExit: if a spectrum is wrong.
    """
    layers, features = (8, 256) if options.quick else (LAYERS, FEATURES)
    nonzero = 3 * ADAPTER_RANK // 4
    pairs = graded_factors(layers, features, ADAPTER_RANK, nonzero)
    spectra = factor_spectra(pairs, 2.0)  # also the round that is not counted
    entries = []
    for index in range(min(options.rounds, layers)):
        a, b = pairs[index]
        truth = torch.linalg.svdvals(2.0 * b.double() @ a.double())[:ADAPTER_RANK]
        counted = truth > FLOOR * truth[0]
        error = float(((spectra[index] - truth)[counted] / truth[counted]).abs().max())
        rank = int((spectra[index] > 1e-6 * spectra[index][0]).sum())
        if not error <= BOUND or rank != nonzero:
            raise SystemExit(f"layer {index}: relative error {error:.1e}, rank {rank} instead of {nonzero}")
        product = 2.0 * b @ a
        dense = records.seconds(lambda product=product: torch.linalg.svdvals(product))
        ours = records.seconds(lambda: factor_spectra(pairs, 2.0))
        ratio = dense / (ours / layers)
        entries.append({"dense_seconds": dense, "all_layers_seconds": ours, "ratio": ratio, "error": error})
    # Both factors read once, and the lower triangles of their Gram matrices.
    flops = 2.0 * features * ADAPTER_RANK * (ADAPTER_RANK + 1)
    return {
        "layers": layers,
        "features": features,
        "rank": ADAPTER_RANK,
        "nonzero": nonzero,
        "measured_layers": len(entries),
        "note": "per layer: one product's svdvals against the mean over all layers of one batched call",
        "entries": entries,
        "smallest_ratio": min(item["ratio"] for item in entries),
        "floor": Floor(flops, 8.0 * features * ADAPTER_RANK, here(), "float32").record(),
    }


def rows(entry: Mapping[str, Any]) -> list[Row]:
    """Time per layer."""
    what = f"an adapter of {entry['features']} x {entry['features']}, rank {entry['rank']}"
    floor = entry.get("floor", {}).get("seconds")
    return [
        Row(what, "svdvals of B A", item["all_layers_seconds"] / entry["layers"], item["dense_seconds"], floor, TARGET)
        for item in entry["entries"]
    ]


def notes(entry: Mapping[str, Any]) -> list[str]:
    """What was compared."""
    worst = max(item["error"] for item in entry["entries"])
    return [f"{entry['note']} of {entry['layers']}; largest relative error {worst:.1e}"]


SUBJECT = Subject(
    name="spectrum",
    about="The spectra of a whole model's adapters in one call against torch.linalg.svdvals of the products B A; "
    "singular values and ranks must be those of float64.",
    cases={"adapters": measure},
    rows=rows,
    notes=notes,
    full=("adapters",),
    quick=("adapters",),
    rounds=2,
)
