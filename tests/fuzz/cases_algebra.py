"""How to call the matrix algorithms, the landscape's measurements and the pure parts of methods and statistics."""

import torch
from cases_ops import finite, needs_finite
from hostile import FLOATS, QUIET, sizes, tensors
from hypothesis import strategies as st
from outcomes import close
from registry import Case, add
from torch import nn

from lora_kernels import init, landscape, linalg, statistics

WIDE = (torch.float32, torch.float64)
positive = st.sampled_from((1, 2, 3, 5, 8, 13))


@st.composite
def matrix(draw, rows=None, columns=None, dtypes=FLOATS, values=(*QUIET, "nan")):
    shape = (draw(sizes) if rows is None else rows, draw(sizes) if columns is None else columns)
    return draw(tensors(shape, draw(st.sampled_from(dtypes)), values))


def _is_basis(before, _after, result):
    w, (u, s, vh) = before["weight"], result
    size = torch.linalg.vector_norm(w) if w.numel() else w.new_zeros(())
    close((u.double() * s.double()) @ vh.double(), w, size.expand_as(w), 1e-10 if u.dtype == torch.float64 else 1e-5)


add(Case(linalg.core_basis, st.fixed_dictionaries({"weight": matrix()}), _is_basis, refused=needs_finite("weight")))


@st.composite
def _eigh_topk(draw):
    n = draw(positive)
    m = draw(matrix(n, n, values=QUIET))
    made = (m + m.mT).detach() / 2
    return {"matrices": made, "k": draw(st.integers(1, n)), "tolerance": 1e-9, "seed": 1}


def _is_top(before, _after, result):
    truth = torch.linalg.eigvalsh(before["matrices"]).flip(-1)[..., : before["k"]]
    close(result.values, truth, before["matrices"].abs().sum().expand_as(truth) + 1e-30, 1e-9)


add(Case(linalg.eigh_topk, _eigh_topk(), _is_top))


@st.composite
def _randomized_svd(draw):
    m, n = draw(positive), draw(positive)
    return {
        "a": draw(matrix(m, n)), "rank": draw(st.integers(1, min(m, n))), "n_iter": draw(st.none() | st.just(1)),
        "probes": draw(st.sampled_from((0, 4))), "seed": 3,
    }  # fmt: skip


def _is_svd(before, _after, result):
    truth = torch.linalg.svdvals(before["a"])[: before["rank"]]
    assert result.S.shape == truth.shape
    assert bool((result.S.double() <= truth + 1e-3 * truth.max() + 1e-20).all()), "a singular value is too large"


add(Case(linalg.randomized_svd, _randomized_svd(), _is_svd, refused=needs_finite("a")))


@st.composite
def pair(draw, values=QUIET):
    r, n, m = draw(positive), draw(positive), draw(positive)
    dtype = draw(st.sampled_from(FLOATS))
    return draw(tensors((r, n), dtype, values)), draw(tensors((m, r), dtype, values))


@st.composite
def adapters(draw, values=(*QUIET, "nan")):
    a, b = draw(pair(values))
    return landscape.Adapter("layer", a, b, draw(st.sampled_from((1.0, -0.5, 2.0))))


add(
    Case(
        landscape.Adapter,
        pair().map(lambda p: {"name": "x", "a": p[0], "b": p[1], "scaling": 1.0, "weight": None, "start": None}),
        corrupt=("a", "b", "scaling", "start"),
    )
)
add(
    Case(
        landscape.factor_spectra,
        st.lists(pair((*QUIET, "nan")), max_size=3).map(lambda pairs: {"factors": pairs, "scalings": 1.0}),
    )
)
add(
    Case(
        landscape.measure,
        st.lists(adapters(), max_size=3).map(lambda each: {"adapters": each, "rank_tolerance": 1e-2}),
        lambda before, _after, result: all(
            (each.status == "not_finite") == (not finite(before["adapters"][0].a, before["adapters"][0].b))
            for each in result.values()
        ) or len(before["adapters"]) > 1 or _fail("status"),
    )
)  # fmt: skip


def _fail(what):
    raise AssertionError(what)


add(Case(landscape.directions, adapters(QUIET).map(lambda each: {"adapter": each, "count": 1})))


def _spectrum(adapter):
    return landscape.measure([adapter])["layer"]


add(
    Case(
        landscape.judge,
        adapters().map(lambda each: {"spectrum": _spectrum(each), "certificate": None, "thresholds": None}),
    )
)
add(Case(landscape.overall, adapters().map(lambda each: {"verdicts": [landscape.judge(_spectrum(each))]})))


@st.composite
def _certify(draw):
    adapter = draw(adapters(QUIET))
    shape = (adapter.b.shape[0], adapter.a.shape[1])
    gradient = statistics.Gradient(draw(tensors(shape, torch.float32, QUIET)))
    return {"adapter": adapter, "spectrum": _spectrum(adapter), "gradient": gradient, "weight_decay": 0.1, "gain": None}


add(Case(landscape.certify, _certify()))


@st.composite
def _weight_rows(draw):
    weight = draw(tensors((draw(positive), draw(positive)), draw(st.sampled_from(WIDE)), QUIET))
    return {"blocks": lambda: iter(weight.detach().split(2)), "shape": tuple(weight.shape), "device": "cpu"}


add(Case(landscape.weight_norms, _weight_rows(), corrupt=("device",)))
add(Case(landscape.leading_directions, _weight_rows().map(lambda each: {**each, "count": 2}),
         corrupt=("device", "count")))  # fmt: skip


@st.composite
def _overlap(draw):
    adapter = draw(adapters(("normal",)))
    weight = torch.randn(adapter.b.shape[0], adapter.a.shape[1], generator=torch.Generator().manual_seed(2))
    return {"update": landscape.directions(adapter, 1), "weight": linalg.randomized_svd(weight, 1)}


add(Case(landscape.overlap, _overlap()))
add(
    Case(
        landscape.Thresholds,
        st.fixed_dictionaries({"rank_tolerance": st.just(0.01), "ratio": st.just(0.1), "loud_share": st.just(3.0)}),
    )
)

for method in (*init.METHODS.values(), init.Redistribution):
    known = {"rho", "seed", "min_rank", "max_rank", "multiple_of", "gamma", "beta", "damping", "score"}
    names = known & set(method.__dataclass_fields__)
    defaults = {name: method.__dataclass_fields__[name].default for name in sorted(names)}
    add(Case(method, st.fixed_dictionaries({name: st.just(value) for name, value in defaults.items()})))
add(
    Case(
        init.redistribute,
        st.fixed_dictionaries(
            {
                "scores": st.just({"a": [3.0, 2.0, 1.0], "b": [2.5, 0.5, 0.1]}),
                "budget": st.integers(0, 6),
                "min_rank": st.just(0),
                "multiple_of": st.integers(1, 2),
            }
        ),
        lambda before, _after, result: sum(result.values()) <= before["budget"] or _fail("over the budget"),
    )
)
add(Case(init.resolve_method, st.sampled_from(sorted(init.METHODS)).map(lambda name: {"method": name})))
add(
    Case(
        statistics.resolve_wants,
        st.sampled_from((*statistics.STATISTICS, ("fisher", "gradient"), None, {"fisher": True})).map(
            lambda wants: {"wants": wants}
        ),
    )
)
add(
    Case(
        statistics.parse_budget,
        st.sampled_from((None, 1000, 0.5, "40GB", "auto", "1 MiB")).map(lambda b: {"budget": b}),
    )
)
add(
    Case(
        statistics.make_plan,
        st.fixed_dictionaries(
            {
                "targets": st.just([statistics.Target("a", nn.Linear(4, 3), 4, 3)]),
                "wants": st.sampled_from(({"input_second": False}, {"gradient": True, "fisher": False})),
                "budget": st.none() | st.just(10**6),
                "form": st.sampled_from(("auto", "exact", "sketch")),
                "sketch_size": st.just(2),
                "world_size": st.just(1),
                "dtype": st.sampled_from(WIDE),
                "groups": st.none() | st.just([["a"]]),
            }
        ),
    )
)
add(
    Case(
        statistics.CollectOptions,
        st.fixed_dictionaries(
            {
                "mask": st.sampled_from(("attention", "labels", None)),
                "max_batches": st.none() | st.just(3),
                "nonfinite": st.just("raise"),
                "dtype": st.sampled_from(WIDE),
                "sketch_size": st.just(8),
                "seed": st.just(0),
                "budget": st.none(),
                "checkpoint": st.none(),
                "checkpoint_every": st.just(5),
                "weighting": st.just("token"),
                "reduction": st.just("auto"),
            }
        ),
    )
)


@st.composite
def batches(draw):
    labels = torch.tensor([[1, -100, 2], [0, 1, -100]])
    return draw(st.sampled_from((
        {"input_ids": labels.abs(), "labels": labels, "attention_mask": labels != 0},
        {"x": torch.ones(2, 3)}, torch.ones(2, 3),
    )))  # fmt: skip


add(
    Case(
        statistics.token_weights, batches().map(lambda batch: {"batch": batch, "mask": "attention"}), corrupt=("batch",)
    )
)
add(
    Case(
        statistics.loss_items,
        batches().map(lambda batch: {"model": nn.Linear(2, 2), "batch": batch, "reduction": "auto"}),
        lambda before, _after, result: (
            result.shape == (before["batch"].shape[:1] if isinstance(before["batch"], torch.Tensor) else (2,))
            or _fail("counts")
        ),
        corrupt=("batch", "reduction"),
    )
)
