"""Printed reports: names of any kind, and notes that many layers share."""

import io

from rich.console import Console

from lora_kernels.reports import Table, console, counted, printable, short_name

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
