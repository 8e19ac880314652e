"""Every public function, with what it expects and with what it does not."""

import cases_models
import pytest
import torch
from hostile import corrupted
from hypothesis import given
from hypothesis import strategies as st
from outcomes import close, examples, outcome
from registry import load

import lora_kernels
from lora_kernels import ops

CASES = load()
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


MODULES = (lora_kernels, lora_kernels.ops, lora_kernels.linalg, lora_kernels.landscape, lora_kernels.init,
           lora_kernels.statistics, lora_kernels.training, lora_kernels.api)  # fmt: skip
# Public, and not called here: why.
RESULTS = {
    "AccelerateReport", "Certificate", "DashLayer", "DashReport", "DashRun", "Diagnosis", "ExportedLayer",
    "ExpertsDiagnosis", "GradientSketch",
    "InitReport", "InputMoments", "InputSketch", "LayerDiagnosis", "LayerErrors", "LayerFactors", "LayerPath",
    "LayerReport", "LayerStatistics", "LearningRateAdvice",
    "LoraFactors", "OutputMoments", "Overlap", "Plan",
    "RandomizedSVD", "Spectrum", "TopEigenpairs", "Verdict", "VerifyReport",
    "FisherDiagonal", "WeightGradient", "WeightNorms",
}  # fmt: skip
ELSEWHERE = {
    "Statistics": "tests/fuzz/test_fuzz_files.py: load",
    "load": "tests/fuzz/test_fuzz_files.py",
    "Dropout": "an argument of the ops",
    "Gradient": "an argument of certify",
    "LinearOperator": "its products are the caller's functions",
    "Target": "an argument of make_plan",
    "InitMethod": "a protocol",
    "LandscapeCallback": "called by transformers",
    "LearningRateCallback": "called by transformers",
    "suggest_learning_rate": "tests/api/test_learning_rate.py: takes a model and its data",
    "LoraDashCallback": "called by transformers",
    "LoraPro": "by create_lora_pro_optimizer",
    "tune": "measures for seconds; tests/test_tuning.py",
    "export": "tests/adapters/test_start.py",
    "reference_mode": "takes any objects with attributes",
    "collect": "lora_kernels.collect is the public way to statistics.collect",
}


def test_every_public_function_is_fuzzed():
    known = {case.function for case in CASES.values()}
    missing = []
    for module in MODULES:
        for name in module.__all__:
            each = getattr(module, name)
            if callable(each) and each not in known and name not in RESULTS and name not in ELSEWHERE:
                missing.append(f"{module.__name__}.{name}")
    assert not missing, f"public functions without a case in tests/fuzz: {', '.join(missing)}"
    stale = [name for name in (*RESULTS, *ELSEWHERE) if not any(hasattr(module, name) for module in MODULES)]
    assert not stale


def test_the_suite_can_fail():
    def wrong(x):
        """Wrong.

        Raises:
            ValueError: sometimes.
        """
        return {"int": lambda: 1 / 0, "str": lambda: int(x), "bytes": lambda: len(x)}[type(x).__name__]()

    with pytest.raises(AssertionError, match="undocumented"):
        outcome(wrong, {"x": 1})
    with pytest.raises(AssertionError, match="happened instead"):
        outcome(wrong, {"x": "no"})
    assert outcome(wrong, {"x": b"12"}) == (True, 2)
    half = torch.full((3,), 0.5)
    for found in (half * 2, half + 1e-3, half * torch.nan):
        with pytest.raises(AssertionError):
            close(found, half, half)
    close(half, half, half)
    with pytest.raises(AssertionError, match="finite"):
        close(half, half * torch.nan, half)


@pytest.mark.parametrize("function", [lora_kernels.collect, lora_kernels.initialize])
@pytest.mark.parametrize("loader", [None, 3, object(), torch.float32])
def test_what_is_no_loader(function, loader):
    assert not outcome(function, {"model": cases_models.adapted(), "loader": loader})[0]


IN_PLACE = [ops.covariance_, ops.gradient_statistics_, ops.sketch_, ops.expand, ops.lora_pro_adam_]


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("function", IN_PLACE, ids=lambda each: each.__name__)
def test_results_that_overlap_an_input_or_themselves(function, backend):
    square = torch.randn(4, 4)
    calls = {
        "covariance_": [{"out": square, "x": square}, {"out": torch.zeros(4).expand(4, 4), "x": square}],
        "gradient_statistics_": [
            {"gradient": square, "fisher": None, "g": square, "x": torch.ones(4, 4)},
            {"gradient": torch.zeros(4, 4), "fisher": square[0], "g": square, "x": torch.ones(4, 4)},
        ],
        "sketch_": [{"out": square, "left": torch.ones(4, 4), "right": square, "seed": 0}],
        "expand": [
            {"t": square, "b": torch.ones(4, 4), "out": square},
            {"t": square, "b": torch.ones(4, 4), "out": torch.zeros(1, 4).expand(4, 4)},
        ],
        "lora_pro_adam_": [
            {"exp_avg": square, "exp_avg_sq": square, "a": torch.ones(1, 4), "b": torch.ones(4, 1),
             "grad_a": torch.ones(1, 4), "grad_b": torch.ones(4, 1), "scaling": 1.0, "step": 1},
            {"exp_avg": square, "exp_avg_sq": torch.ones(4, 4), "a": square[:1], "b": torch.ones(4, 1),
             "grad_a": torch.ones(1, 4), "grad_b": torch.ones(4, 1), "scaling": 1.0, "step": 1},
        ],
    }  # fmt: skip
    before = square.clone()
    for arguments in calls[function.__name__]:
        worked, error = outcome(function, {**arguments, "backend": backend})
        assert not worked and "share memory" in str(error) and torch.equal(square, before)


def test_nothing_is_written_through_a_negation():
    out = torch._neg_view(torch.zeros(3, 3))
    worked, error = outcome(ops.covariance_, {"out": out, "x": torch.ones(2, 3)})
    assert not worked and "negates" in str(error)


def test_columns_of_one_matrix_are_apart():
    both = torch.cat((torch.zeros(3, 3), torch.ones(3, 3)), 1)
    ops.covariance_(both[:, :3], both[:, 3:])
    assert bool((both[:, :3].tril() == torch.full((3, 3), 3.0).tril()).all())


@pytest.mark.parametrize("backend", ["auto", "torch", "cpp"])
def test_views_that_negate_and_zeros_without_memory(backend):
    x, w, a, b = (torch.randn(size) for size in ((5, 4), (3, 4), (2, 4), (3, 2)))
    truth = ops.lora_linear(x, w, None, a, b, scaling=1.0, backend="torch")
    negated = [torch._neg_view(-each) for each in (x, w, a, b)]
    assert all(each.is_neg() for each in negated)
    found = ops.lora_linear(negated[0], negated[1], None, negated[2], negated[3], scaling=1.0, backend=backend)
    torch.testing.assert_close(found, truth)
    nothing = torch._efficientzerotensor((5, 4))
    assert not bool(ops.lora_linear(nothing, w, None, a, b, scaling=1.0, backend=backend).any())
    x.requires_grad_()
    ops.lora_linear(x, w, None, a, b, scaling=1.0, backend=backend).backward(torch._neg_view(-torch.ones(5, 3)))
    torch.testing.assert_close(x.grad, (torch.ones(5, 3) @ (w + b @ a)))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_lapack_loses_a_nan(place, bad, backend):
    y = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    y[place] = bad
    one = torch.ones(1, 1, dtype=torch.float64)
    for function, arguments in (
        (ops.orthonormalize, {"y": y}),
        (ops.factor_spectrum, {"a": one, "b": y}),
        (ops.factor_spectrum, {"a": y.mT, "b": one}),
    ):
        worked, error = outcome(function, {**arguments, "backend": backend})
        assert not worked and "NaN or infinite" in str(error)


def test_lengths_beyond_float64():
    y = torch.full((2, 1), 1.6e308, dtype=torch.float64)
    q, r = ops.orthonormalize(y)
    torch.testing.assert_close(q, torch.full_like(q, 0.5**0.5))
    assert torch.isinf(r).all()


@pytest.mark.parametrize("empty", ["features", "outputs", "rank"])
def test_layers_without_anything(empty):
    n, m, r = (0 if empty == each else 3 for each in ("features", "outputs", "rank"))
    x, w, a, b = torch.ones(2, n, requires_grad=True), torch.ones(m, n), torch.ones(r, n), torch.ones(m, r)
    for dropout in (None, ops.Dropout(0.5, 1)):
        found = ops.lora_linear(x, w, None, a, b, scaling=1.0, dropout=dropout)
        assert found.shape == (2, m)
        found.sum().backward()


@pytest.mark.parametrize("function", ["shrink", "lora_linear", "covariance_", "use_form", "random_matrix"])
def test_memory_that_was_freed(function):
    freed = torch.ones(3, 3)
    freed.untyped_storage().resize_(0)
    calls = {
        "shrink": {"x": freed, "a": torch.ones(2, 3)},
        "lora_linear": {
            "x": torch.ones(2, 3), "weight": freed, "bias": None, "a": torch.ones(1, 3), "b": torch.ones(3, 1),
            "scaling": 1.0,
        },
        "covariance_": {"out": torch.zeros(3, 3), "x": freed},
        "use_form": {"name": freed},
        "random_matrix": {"rows": freed, "columns": 2, "seed": 0},
    }  # fmt: skip
    function = getattr(ops, function)
    if function is ops.use_form:
        with pytest.raises(ValueError, match="form is a tensor"), ops.use_form(freed):
            pass
        return
    worked, error = outcome(function, calls[function.__name__])
    assert not worked and ("freed" in str(error) or "must be an int" in str(error))


@pytest.mark.parametrize("number", [10**400, -(10**400), 2**64])
def test_numbers_beyond_floats(number):
    x, a = torch.ones(2, 3), torch.ones(1, 3)
    assert outcome(ops.shrink, {"x": x, "a": a, "scale": number})[0] == (number == 2**64)
    assert not outcome(ops.random_matrix, {"rows": number, "columns": 1, "seed": 0})[0]
    assert not outcome(ops.random_matrix, {"rows": 1, "columns": 1, "seed": number})[0]


def test_a_frozen_pair_of_float32_in_a_float64_layer():
    x, w, a, b = (torch.randn(size, dtype=torch.float64) for size in ((5, 4), (3, 4), (2, 4), (3, 2)))
    a0, b0 = torch.randn(2, 4), torch.randn(3, 2)
    found = ops.lora_linear(x, w, None, a, b, scaling=0.7, extra=(a0, b0, -0.3))
    truth = x @ (w + 0.7 * b @ a - 0.3 * b0.double() @ a0.double()).mT
    torch.testing.assert_close(found, truth, rtol=1e-13, atol=1e-13)
