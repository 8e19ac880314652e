"""Write README.md's numbers, docs/results.md and the summary `results/compare.json` from the committed records.

`python -m benchmarks.readme`, after every run that is to be quoted.
"""

from __future__ import annotations

import re
import sys
from typing import Any

from benchmarks import compare, sections
from benchmarks.demo import study_report
from benchmarks.records import RESULTS, ROOT

README = ROOT / "README.md"
PAGE = ROOT / "docs" / "results.md"
_MARKS = ("<!-- numbers: written by benchmarks/readme.py -->", "<!-- end of numbers -->")


def _in_short(record: dict[str, Any]) -> str:
    """A study's end in a sentence or two.

    Args:
        record: of `benchmarks.demo.study`.

    Returns:
        Markdown.
    """
    found: dict[str, list[str]] = {"ahead": [], "level": [], "behind": []}
    for arm, measures in study_report.compare_all(record).items():
        verdict = "behind" if measures is None else measures["loss"][-1][1].verdict
        found[verdict].append(study_report.title(arm))
    data, protocol = record["data"], record["protocol"]
    said = {
        "ahead": "ahead of random LoRA",
        "level": "not distinguishable from it",
        "behind": "behind",
    }
    parts = [f"{said[kind]}: {', '.join(arms) if arms else 'none'}" for kind, arms in found.items()]
    return (
        f"- {data['name']} ({data['train']} training texts, {data['classes']} classes, "
        f"{protocol['evaluate_at'][-1]} steps): by test loss at the end {'; '.join(parts)}."
    )


def block() -> str:
    """The numbers, as they must stand in the README."""
    parts = [*sections.summary(), "", sections.training()[0]]
    parts += [
        "",
        "Does it help? MiniLM-L6 on labelled texts, every arm at the learning rate that was best for it on other texts "
        "and other seeds, against random LoRA at its own best, three seeds, 95 % intervals:",
        "",
        *(_in_short(record) for record in sections.studies().values()),
        "",
        *(sections.caution() if "quality_docstrings" in sections.studies() else ()),
        "Their authors report gains on larger models and longer runs; `python -m benchmarks.demo.study --data FOLDER` "
        "asks the question of your own texts. All tables, curves and figures: [docs/results.md](docs/results.md).",
    ]
    return "\n".join([_MARKS[0], *parts, _MARKS[1]])


def page() -> str:
    """The page of all results."""
    chapters = {
        "Everything in one table": sections.summary(),
        "Initialisation: EVA": sections.eva(),
        "Statistics": sections.statistics(),
        "Initialisation: all methods": sections.methods(),
        "The fused layer": sections.layers(),
        "The training step": sections.training(),
        "A language model's training step": sections.language_model(),
        "LoRA-Pro": sections.lora_pro(),
        "Landscape": sections.landscape(),
        "Linear algebra": sections.linalg(),
        "The demo": sections.demo(),
        "Does it help?": sections.quality(),
    }
    lines = ["<!-- written by benchmarks/readme.py from the records: edit that, and run it again -->", "", "# Results"]
    for title, section in chapters.items():
        if section:
            lines += ["", f"## {title}", "", *section]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Rewrite the README's numbers, the page and the summary.

    Returns:
        0.
    """
    compare.write_summary(RESULTS)
    text = README.read_text()
    pattern = re.compile(f"{re.escape(_MARKS[0])}.*?{re.escape(_MARKS[1])}", flags=re.S)
    README.write_text(pattern.sub(lambda _: block(), text))
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
