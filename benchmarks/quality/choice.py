"""The choice of a learning rate from runs at several."""

from __future__ import annotations

import statistics
from typing import Any


def choose(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Chooses each arm's rate: the lowest mean held-out loss after the last step, of those that finished every seed.

    Args:
        runs: Entries with `arm`, `learning_rate` and `final_loss` (None where the run diverged).

    Returns:
        Per arm the `rate`, the mean `losses` by rate (None where a seed diverged) and whether the choice is `at_edge`
        of the grid.

    Raises:
        ValueError: Every rate of an arm diverged.
    """
    choice: dict[str, dict[str, Any]] = {}
    for arm in sorted({run["arm"] for run in runs}):
        losses: dict[float, list[float | None]] = {}
        for run in runs:
            if run["arm"] == arm:
                losses.setdefault(run["learning_rate"], []).append(run["final_loss"])
        means = {
            rate: None if None in values else statistics.fmean(value for value in values if value is not None)
            for rate, values in sorted(losses.items())
        }
        finished = {rate: mean for rate, mean in means.items() if mean is not None}
        if not finished:
            raise ValueError(f"runs of arm {arm!r} all diverged, at least one rate must finish every seed")
        best = min(finished, key=lambda rate: (finished[rate], rate))
        choice[arm] = {
            "rate": best,
            "at_edge": best in {min(means), max(means)},
            "losses": {f"{rate:g}": mean for rate, mean in means.items()},
        }
    return choice
