"""Ours against the peers, side by side: `python -m benchmarks.compare all` or subjects, then options.

    python -m benchmarks.compare eva --case llama
    python -m benchmarks.compare linear train
    python -m benchmarks.compare llm --resume
    python -m benchmarks.compare all --quick
    python -m benchmarks.compare svd --help

A subject checks its numbers first and stops if they are wrong. All sides are then timed in turn in one process (or in a
process each), medians count, compilation is not timed. Every row says what a peer's time is over ours and what ours is
over the floor: the least that bytes and FLOPs cost at the rates at which this machine copies and multiplies. A case
replaces its entry in `results/<subject>.json`; `results/compare.json` is the summary of all records, which
`python -m benchmarks.pages` puts into docs/results.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import rates, records
from benchmarks.subject import Subject, show
from benchmarks.subjects import SUBJECTS

QUICK_ROUNDS = 2


def parser(subject: Subject) -> argparse.ArgumentParser:
    """The command line of a subject."""
    command = argparse.ArgumentParser(f"python -m benchmarks.compare {subject.name}", description=subject.about)
    command.add_argument("--case", nargs="+", choices=list(subject.cases), help=f"default: {' '.join(subject.full)}")
    command.add_argument("--quick", action="store_true", help=f"small sizes; cases: {' '.join(subject.quick)}")
    command.add_argument("--rounds", type=int, help=f"timed calls of each side; default: {subject.rounds}")
    command.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    command.add_argument("--resume", action="store_true", help="leave out cases that this commit has measured here")
    command.add_argument("--out", type=Path, help="folder for the record; by default results/, none with --quick")
    subject.options(command)
    return command


def parse(subject: Subject, arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a subject, those that are missing filled in."""
    mine = parser(subject)
    options = mine.parse_args(arguments)
    if options.rounds is None:
        options.rounds = min(subject.rounds, QUICK_ROUNDS) if options.quick else subject.rounds
    if options.rounds < 1:
        mine.error("--rounds must be at least 1")
    if not options.quick:
        options.out = options.out or records.RESULTS
    elif options.out is not None and options.out.resolve() == records.RESULTS:
        mine.error("a quick run replaces no committed record: --out must be another folder")
    options.case = options.case or list(subject.quick if options.quick else subject.full)
    return options


def _is_of_this_run(entry: Mapping[str, Any], chosen: Mapping[str, Any]) -> bool:
    """Whether an entry has this environment, but for the time, and these options. Uncommitted code has no name."""
    here, there = ({**environment, "time": ""} for environment in (records.environment(), entry["environment"]))
    return here == there and not here["commit"].endswith("+changes") and entry.get("options") == chosen


def run(subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the cases of a subject, print them, and write each as soon as it is there.

    Args:
        subject: what.
        options: as `parse` returns them.

    Returns:
        The entries by case, those that were left out among them.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    chosen = {name: value for name, value in vars(options).items() if name not in ("case", "out", "resume")}
    known = records.cases(subject.name, options.out) if options.resume and options.out is not None else {}
    entries = {}
    for case in options.case:
        if case in known and _is_of_this_run(known[case], chosen):
            records.CONSOLE.print(f"{subject.name}, {case}: measured before")
            entries[case] = known[case]
            continue
        entry = {"environment": records.environment(), "options": chosen, **subject.cases[case](options)}
        entry["rates"] = rates.here(entry.get("device", "cpu")).record()
        show(subject, case, entry)
        if options.out is not None:
            records.CONSOLE.print(f"record: {records.put(subject.name, case, entry, options.out)}")
        entries[case] = entry
    return entries


def summary(cases: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The table of all subjects: of each problem and peer the row with the lowest ratio.

    Args:
        cases: entries by case, by subject.

    Returns:
        Lines; made of the entries alone.
    """
    return [
        {
            "subject": name,
            "case": case,
            "what": row.what,
            "ours_seconds": row.ours,
            "peer": row.peer,
            "peer_seconds": row.theirs,
            "peer_over_ours": row.ratio,
            "ours_over_floor": row.over_floor,
            "target": row.target,
            "met": row.met,
            "lowest_of": count,
        }
        for name, subject in SUBJECTS.items()
        for case, row, count in subject.headlines(cases.get(name, {}))
    ]


def summarize(folder: Path) -> list[dict[str, Any]]:
    """The summary of a folder's records."""
    return summary({name: records.cases(name, folder) for name in SUBJECTS})


def write_summary(folder: Path) -> Path:
    """Write it to the folder."""
    file = folder / "compare.json"
    file.write_text(json.dumps({"rows": summarize(folder)}, indent=1, allow_nan=False) + "\n")
    return file


def main(arguments: list[str] | None = None) -> int:
    """Compare.

    Args:
        arguments: of the command line.

    Returns:
        0; 2 if the command line is wrong.
    """
    given = sys.argv[1:] if arguments is None else arguments
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), given))
    unknown = [word for word in words if word not in ("all", *SUBJECTS)]
    if not words or unknown:
        wanted = any(word in ("-h", "--help") for word in given)
        lines = [f"  {name:13s} {subject.about}" for name, subject in SUBJECTS.items()]
        problem = "" if wanted else f"error: {unknown[0]!r} is no subject\n" if unknown else "error: no subject named\n"
        print(f"{__doc__}\nSubjects:\n" + "\n".join(lines) + f"\n{problem}", file=sys.stdout if wanted else sys.stderr)
        return 0 if wanted else 2
    names = list(SUBJECTS) if "all" in words else list(dict.fromkeys(words))
    parsed = {name: parse(SUBJECTS[name], given[len(words) :]) for name in names}
    for name, options in parsed.items():
        run(SUBJECTS[name], options)
        if options.out is not None:
            write_summary(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
