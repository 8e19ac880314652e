"""Which initialisation, which optimizer helps on a real task? `python -m benchmarks.quality [--data FOLDER]`.

FOLDER holds `train` and `test`, each a `.csv` or `.jsonl` file of labelled texts (or FOLDER is one such file, which is
then split); the data stay where they are, and the record keeps counts and digests alone. Without FOLDER the task is the
demo's, docstrings of the standard library, for as many steps as the demo takes; its validation texts are held out by
source file, as its test texts are, and its final runs train on all training texts, as the demo's do.

Protocol:

- MiniLM-L6 with a fresh head, LoRA (alpha = rank, so scaling 1) on every linear layer but the head, AdamW without
  weight decay, linear warm-up over a tenth of the steps, then linear decay, gradients clipped to norm 1: as in the
  demo. All arms of a seed share the head's start, the order of the batches and the dropout masks. Methods that keep the
  model's function take their start off beside the adapter (`base="intact"`).
- Data-aware methods read the first 16 batches that training will read, with the head still untrained: that is what a
  user has at that moment. EVA redistributes ranks (rho 2) at the same sum of ranks.
- The adapter's rate is tuned for every arm by itself, over one grid, for the loss after the last step; where the best
  is at the edge the grid is extended on that side, twice at most, and `at_edge` says if that was not enough. The
  results at earlier steps are those of the same runs: no rate is tuned for them.
- LoRA-Pro and LoRA-Dash start from random LoRA. LoRA-Dash takes its directions after half of the steps.
- The head is a fresh classifier and needs a rate of its own: methods that start away from zero want small rates for the
  adapter, at which a head hardly learns. It is the same for all arms, and chosen on random LoRA (the best of a few
  adapter rates for every head rate). If this favours an arm, it is random LoRA.
- Rates are chosen with one seed that is not used again, on a part of the training texts that no run trains on; the test
  texts play no part in it. The final runs on FOLDER train on the same texts as those of the choice. One seed does not
  settle a rate where two are nearly as good: `Protocol.tuning_seeds` takes more.
- Of equal training texts one is kept, and training texts that are also test texts are left out. Texts are cut to
  `max_tokens`; the record says how many were.
- Arms are compared with random LoRA, paired by seed: the demo's rule, a 95 % t interval of the mean difference.

Every run is a function of (arm, seed, rates) alone, on one thread; `--workers` runs go on at a time. Wall times in the
record are those of runs side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from benchmarks import records
from benchmarks.quality import report
from benchmarks.quality.crew import CONSOLE
from benchmarks.quality.protocol import ARMS, LABEL_COLUMNS, QUICK, SHORT, Protocol, Setup
from benchmarks.quality.report import BASELINE
from benchmarks.quality.study import study


def main(arguments: list[str] | None = None) -> int:
    """Runs the study and writes its record and its figure.

    Args:
        arguments: of the command line.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="a folder with train and test, or one .csv or .jsonl file; default: the demo's task"
    )
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", help=f"by default the first there is of {', '.join(LABEL_COLUMNS)}")
    parser.add_argument("--name", help="of the record: quality_NAME; by default that of the data")
    parser.add_argument("--model", type=Path, help="a model folder; by default the packaged MiniLM-L6")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep finished runs here, and go on from them")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder for the record and the figure")
    parser.add_argument("--figure-only", type=Path, metavar="RECORD", help="draw the figure of a record again")
    options = parser.parse_args(arguments)
    if options.figure_only:
        report.draw(json.loads(options.figure_only.read_text()), options.figure_only.with_suffix(".png"))
        return 0
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    # For the workers, which import everything anew.
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    setup = Setup(
        options.data,
        options.text_column,
        options.label_column,
        options.model,
        QUICK if options.quick else SHORT if options.data is None else Protocol(),
        {name: arm for name, arm in ARMS.items() if name == BASELINE or name in options.arms},
    )
    record = study(setup, options.workers, options.resume)
    data = "docstrings" if options.data is None else options.data.resolve().stem
    name = f"quality_{options.name or data}{'_quick' if options.quick else ''}"
    file = records.save(name, record, options.out)
    report.draw(record, file.with_suffix(".png"))
    CONSOLE.print(report.table(record))
    for line in record["verdict"]:
        CONSOLE.print(line, highlight=False, markup=False)
    CONSOLE.print(f"record: {file}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
