"""Printed reports: names of any kind, and notes that many layers share."""

import io

import torch
from rich.console import Console

from lora_kernels.api import InitReport, LayerReport
from lora_kernels.landscape import (
    Adapter,
    Diagnosis,
    LayerDiagnosis,
    Thresholds,
    WeightNorms,
    certify,
    judge,
    measure,
    overall,
)
from lora_kernels.reports import Table, console, counted, printable, short_name
from lora_kernels.statistics import Gradient

NAMES = ("base_model.model.[/x].proj", "[red]a", "layer.\x1b[31m0", ":smile:.1")


def test_names_are_printed_as_they_are():
    table = Table("layer", "note", title="[/title] \x1b[1m")
    for name in NAMES:
        table.add_row(short_name(name), f"[bold]{name}")
    for where in (Console(file=io.StringIO(), width=120), console(120)):
        with where.capture() as captured:
            where.print(table)
        text = captured.get()
        for shown in ("[/x].proj", "[red]a", "layer.\\x1b[31m0", ":smile:.1", "[/title] \\x1b[1m"):
            assert shown in text
        assert "base_model.model.[/x].proj │" in text  # only the first column is of names


def test_a_long_name_is_folded_and_not_cut():
    table = Table("layer", "note", title="")
    table.add_row("model." * 20 + "last", "x" * 30)
    where = Console(file=io.StringIO(), width=60)
    where.print(table)
    lines = where.file.getvalue().splitlines()[3:-1]
    assert "".join(line.strip("│ ").split("│")[0].strip() for line in lines).endswith("model.last")


def test_notes_of_many_layers_are_one_line():
    notes = [(f"base_model.model.{number}", "is narrow") for number in range(210)] + [("head", "is quantized")]
    assert counted(notes) == ["210 layers (0, ...): is narrow", "head: is quantized"]


def test_control_characters_are_written_out():
    assert printable("a\tb\x07\nc") == "a\\tb\\x07\nc"


def lines_of(report, width):
    where = Console(file=io.StringIO(), width=width)
    where.print(report)
    return where.file.getvalue().splitlines()


def rows_of(report, width):
    lines = lines_of(report, width)
    assert max(map(len, lines)) <= width
    return [line for line in lines if line.startswith("│")]


def test_reports_of_layers_have_one_readable_row_per_layer():
    torch.manual_seed(0)
    modules = ("self_attn.q_proj", "mlp.experts.down_proj.base_layer", "mlp.experts.gate_up_proj")
    names = [f"base_model.model.model.layers.{block}.{module}" for block in (0, 11) for module in modules]
    sizes = {"scaling": 2.0, "weight": WeightNorms(3.0, 9.0)}
    adapters = [Adapter(name, torch.randn(4, 12), torch.randn(8, 4), **sizes) for name in names]
    spectra, gradient = measure(adapters), Gradient(torch.randn(8, 12))
    layers = []
    for adapter in adapters:
        spectrum = spectra[adapter.name]
        certificate = certify(adapter, spectrum, gradient, 0.01)
        verdict = judge(spectrum, certificate)
        notes = ("a note of many words " * 9,)
        layers.append(LayerDiagnosis(adapter.name, spectrum, verdict, certificate, notes=notes))
    diagnosis = Diagnosis("default", tuple(layers), overall(layer.verdict for layer in layers), Thresholds())
    note = "damping raised from 1e-6 to 1e-4: the moments are not positive definite"
    entry = {"explained_variance": 0.5, "tokens": 1e6, "start_share": 0.02, "first_step": -12.0, "notes": (note,)}
    reports = [LayerReport(name, "not_reached", 16, 24, **entry) for name in names]
    report = InitReport("lora_da", {}, "default", tuple(reports), {"total": 1.0}, 8, 1e6, 100, 200)
    for shown in (diagnosis, report):
        rows = rows_of(shown, 80)
        cells = [row.strip("│").split("│") for row in rows]
        assert len(rows) == len({names[0] for names in cells}) == len(names)  # each with a name of its own
        assert not any("…" in cell for row in cells for cell in row[1:])
        assert "no room for" in "\n".join(lines_of(shown, 80))
        wide = lines_of(shown, 200)
        assert sum("layers." in line and line.startswith("│") for line in wide) == len(names)
        assert "no room for" not in "\n".join(wide)
    assert any(line.startswith("6 layers (model.layers.0.self_attn.q_proj, ...): damping") for line in wide)
    text = "\n".join(wide)
    assert "not reached" in text and "first step" in text and "1,000,000" in text


def test_columns_without_a_value_are_left_out():
    report = InitReport("eva", {}, "default", (LayerReport("l", "initialised", 4, 4),), {"total": 1.0}, 1, 1.0, 1, 1)
    table = str(report)
    assert "first step" not in table and "status" not in table and "rank" in table
