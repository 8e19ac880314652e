"""Fine-tune a real model with random and with data-aware LoRA, and compare: `python -m benchmarks.demo`."""

from __future__ import annotations

import argparse
import sys
import typing
from dataclasses import fields

from benchmarks.demo.config import ABOUT, DemoConfig


def parser() -> argparse.ArgumentParser:
    """The command line: an option per setting of `DemoConfig`."""
    made = argparse.ArgumentParser("python -m benchmarks.demo", description=__doc__)
    kinds = typing.get_type_hints(DemoConfig)
    for setting in fields(DemoConfig):
        kind = next(kind for kind in (*typing.get_args(kinds[setting.name]), kinds[setting.name]) if kind is not None)
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        else:
            how = {"type": kind}
        about = ABOUT[setting.name] + ("" if setting.default is None else " (default: %(default)s)")
        made.add_argument(f"--{setting.name.replace('_', '-')}", default=setting.default, help=about, **how)
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; 2 where the settings, the data or a missing package forbid it."""
    options = parser().parse_args(arguments)
    try:
        config = DemoConfig(**vars(options))
        from benchmarks.demo.run import run

        return run(config)
    except ValueError as error:
        print(f"demo: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        print(f"demo: {error}; `make demo` installs what it needs", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
