"""Which functions are fuzzed, and how: one `Case` per public function."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hostile import is_plain, plain
from hypothesis import strategies as st
from outcomes import describe, outcome


@dataclass(frozen=True)
class Case:
    """How a function is called, and what must come of it.

    Attributes:
        function: the function.
        valid: keyword arguments of calls that are to succeed.
        check: given the arguments before the call (tensors in float64), those after it, and the result.
        backends: the values of the argument `backend`, if it has one; true for all but Triton.
        triton: whether Triton's interpreter is tried, too.
        refused: whether a valid call must end in an error for its values (NaN), given the arguments before it.
        may_refuse: whether it may.
        enter: whether the result is a context manager, which is entered and left.
        documentation: where the errors are documented, if not at the function.
        corrupt: arguments that are worth corrupting; all by default.
        weight: how many of the usual number of examples are run.
    """

    function: Callable[..., Any]
    valid: st.SearchStrategy[dict[str, Any]]
    check: Callable[[dict, dict, Any], None] | None = None
    backends: bool | tuple[str, ...] = ()
    triton: bool = False
    refused: Callable[[dict], bool] = lambda _before: False
    may_refuse: Callable[[dict], bool] = lambda _before: False
    enter: bool = False
    documentation: Any = None
    corrupt: tuple[str, ...] = ()
    weight: float = 1.0
    name: str = ""

    @property
    def label(self):
        module = self.function.__module__.rpartition(".")[0].removeprefix("lora_kernels.")
        return self.name or f"{module}.{self.function.__qualname__}"

    def choices(self):
        return ("auto", "cpp", "torch") if self.backends is True else self.backends

    def run(self, arguments, *, valid):
        """Call with arguments, which must succeed if they are valid, and check the answer."""
        before = {name: plain(value) for name, value in arguments.items()}
        usable = all(is_plain(value) for value in before.values() if isinstance(value, torch.Tensor))
        worked, result = outcome(
            self._entered if self.enter else self.function, arguments, documentation=self.documentation or self.function
        )
        if valid and not self.may_refuse(before):
            named = arguments.get("backend") in ("cpp", "triton") and isinstance(result, RuntimeError)
            refused = self.refused(before)
            assert worked or refused or named, f"{self.label}({describe(arguments)}) was refused: {result!r}"
            assert not (worked and refused), f"{self.label}({describe(arguments)}) should have been refused"
        if worked and usable and self.check is not None:
            before |= {name: float(before[name]) for name in FACTORS & set(before) if type(before[name]) is int}
            try:
                self.check(before, arguments, result)
            except AssertionError as error:
                raise AssertionError(f"{self.label}({describe(arguments)}): {error}") from None
            except Exception as error:
                raise AssertionError(
                    f"{self.label}({describe(arguments)}) accepted what has no answer: {error!r}"
                ) from error

    def _entered(self, **arguments):
        with self.function(**arguments):
            pass


FACTORS = {"scale", "scaling", "damping", "power"}  # which ops take as floats, whatever they are
CASES: dict[str, Case] = {}


def load():
    """All cases, of all modules `cases_*` beside this one."""
    for file in sorted(Path(__file__).parent.glob("cases_*.py")):
        importlib.import_module(file.stem)
    return CASES


def add(case):
    assert case.label not in CASES, case.label
    CASES[case.label] = case
    return case
