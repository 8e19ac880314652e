"""Every public function, with what it expects and with what it does not."""

import cases_ops  # noqa: F401
import pytest
from hostile import corrupted
from hypothesis import given
from hypothesis import strategies as st
from outcomes import examples
from registry import CASES

RUNS = [
    pytest.param(case, backend, id=f"{name}-{backend}")
    for name, case in CASES.items()
    for backend in case.choices() or (None,)
]


def with_backend(case, backend):
    return case.valid if backend is None else case.valid.map(lambda each: {**each, "backend": backend})


@pytest.mark.parametrize(("case", "backend"), RUNS)
def test_valid_calls_give_the_right_answer(case, backend):
    @examples(max(2, round(12 * case.weight)))
    @given(with_backend(case, backend))
    def run(arguments):
        case.run(arguments, valid=True)

    run()


@pytest.mark.parametrize(("case", "backend"), RUNS)
def test_hostile_calls_give_a_documented_error_or_the_right_answer(case, backend):
    @examples(max(2, round(20 * case.weight)))
    @given(corrupted(with_backend(case, backend), case.corrupt))
    def run(arguments):
        case.run(arguments, valid=False)

    run()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.triton])
def test_in_tritons_interpreter(name):
    case = CASES[name]

    @examples(2)
    @given(st.one_of(with_backend(case, "triton"), corrupted(with_backend(case, "triton"), case.corrupt)))
    def run(arguments):
        case.run(arguments, valid=False)

    run()
