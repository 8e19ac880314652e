"""The forms of the LoRA layer's large product: each gives the same layer, and the one that runs is the one measured."""

import dataclasses
import functools
import json
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lora_kernels.ops import Dropout, lora_delta, lora_linear, use_form
from lora_kernels.ops._tiles import capability_of
from lora_kernels.ops.lora_linear import config, forms, reference, table
from lora_kernels.ops.lora_linear.forms import Choice
from lora_kernels.ops.lora_linear.table import Key, Record
from tests.conftest import relative_error
from tests.ops.test_lora_linear import DROPOUTS, check_all, differentiate, make, make_extra

CPU = torch.device("cpu")
_BOTH = [("forward", False), ("backward", False), ("backward", True)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A user's table that is not there yet."""
    file = tmp_path / "tuned.json"
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(file))
    forms.forget()
    yield file
    forms.forget()


@pytest.fixture
def ran(monkeypatch):
    """What every product ran in."""
    found, combine = [], forms.combine

    def spy(*args, choice, **kwargs):
        found.append(choice)
        return combine(*args, choice=choice, **kwargs)

    monkeypatch.setattr(forms, "combine", spy)
    monkeypatch.setattr(forms, "untuned", functools.cache(lambda: False))  # else one call of C++ does it all on the CPU
    return found


def key(product="forward", **changes):
    own = Key(forms.chip_name(CPU), "float32", 8, 12, 9, 16, False, product)
    return dataclasses.replace(own, **changes)


def record(form="expand_add", *, chosen=None, versions=None, **changes):
    versions = table.versions() if versions is None else versions
    return Record(key(**changes), form, chosen, {"expand_first": 2.0, form: 1.0}, versions)


def layer():
    """Seven tokens, twelve inputs, nine outputs, rank three."""
    return make((7,), 12, 9, 3)


@pytest.mark.parametrize("ratio", [None, -1.0, 0.4], ids=["no extra", "taken off", "extra"])
@pytest.mark.parametrize("dropout", DROPOUTS, ids=["whole", "dropped"])
@pytest.mark.parametrize("leading, features, outputs, rank", [((0,), 8, 5, 2), ((5, 7), 50, 33, 5), ((), 16, 9, 3)])
@pytest.mark.parametrize(
    "form, backend", [("expand_first", "auto"), ("expand_add", "torch"), ("expand_add", "auto"), ("gemm", "triton")]
)
def test_every_form_matches_float64(form, backend, leading, features, outputs, rank, dropout, ratio, poisoned_memory):
    if form == "gemm":
        pytest.importorskip("triton")
    extra = None if ratio is None else make_extra(features, outputs, 0.7 * ratio)
    with use_form(form):
        check_all(make(leading, features, outputs, rank), dropout, extra, backend)


@pytest.mark.parametrize("form, backend", [("expand_first", "auto"), ("expand_add", "auto"), ("gemm", "triton")])
def test_narrow_dtypes(form, backend):
    if form == "gemm":
        pytest.importorskip("triton")
    for dropout in DROPOUTS:
        with use_form(form):
            check_all(make((40,), 48, 30, 8, torch.float16), dropout, None, backend)


@pytest.mark.parametrize("form, backend", [("expand_add", "torch"), ("gemm", "triton")])
def test_no_bias_and_a_transposed_weight(form, backend):
    if form == "gemm":
        pytest.importorskip("triton")
    x, weight, _, a, b = make((20,), 24, 18, 4)
    turned = weight.detach().mT.contiguous().mT.requires_grad_()
    grad = torch.randn(20, 18)
    run = lambda *each: lora_linear(each[0], each[1], None, *each[2:], scaling=0.5, backend=backend)  # noqa: E731
    plain = lambda *each: reference.lora_linear(each[0], each[1], None, *each[2:], scaling=0.5)  # noqa: E731
    with use_form(form):
        found = differentiate(run, (x, turned, a, b), grad)
    truth = differentiate(plain, (x, weight, a, b), grad, torch.float64)
    assert all(relative_error(one, two) < 1e-6 for one, two in zip(found, truth, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("form", table.FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", DROPOUTS, ids=["whole", "dropped"])
@pytest.mark.parametrize("sizes", [(1000, 512, 768, 16), (333, 257, 129, 5), (4096, 1024, 4096, 64)], ids=str)
def test_every_form_on_a_gpu(sizes, dropout, dtype, form):
    tokens, features, outputs, rank = sizes
    tensors = [each.detach().cuda().requires_grad_() for each in make((tokens,), features, outputs, rank, dtype)]
    grad = torch.randn(tokens, outputs, device="cuda").to(dtype)
    run = lambda *each: lora_linear(*each, scaling=0.5, dropout=dropout, backend="triton")  # noqa: E731
    with use_form(form):
        found = differentiate(run, tensors, grad)
        again = differentiate(run, tensors, grad)
    plain = lambda *each: reference.lora_linear(*each, scaling=0.5, dropout=dropout)  # noqa: E731
    truth = differentiate(plain, tensors, grad, torch.float64)
    own = differentiate(plain, tensors, grad, dtype)
    for one, two, exact, torchs in zip(found, again, truth, own, strict=True):
        assert relative_error(one, exact) <= 2 * relative_error(torchs, exact) + 3e-6
        assert torch.equal(one, two)


@pytest.mark.gpu
@pytest.mark.parametrize("name", config.CONFIGS)
def test_shipped_configurations_on_a_gpu(name):
    """All that are meant for this chip, at a size that fills their tiles."""
    from lora_kernels.ops.lora_linear.measure import measure

    device, each = torch.device("cuda"), config.CONFIGS[name]
    ran = 0
    for dtype in (torch.bfloat16, torch.float32):
        if each in config.candidates(dtype, capability=capability_of(device)):
            for product in table.PRODUCTS:
                numbers = (2048, 768, 1024, 16, product == "backward", product)
                own = Key(forms.chip_name(device), str(dtype).removeprefix("torch."), *numbers)
                found = measure(own, tokens=2048, rank=16, device=device, dtype=dtype, rounds=1)
                assert not found.wrong and f"gemm {name}" in found.seconds, found.refused
                ran += 1
    if not ran:
        pytest.skip("not meant for this chip")


def test_the_default(cache, ran):
    lora_linear(*layer(), scaling=1.0).sum().backward()
    assert ran == [Choice("expand_first")] * 2
    # Without a weight there is but one form.
    x, _, _, a, b = layer()
    with use_form("gemm"):
        lora_delta(torch.randn(7, 9), x, a, b, scaling=1.0).sum().backward()
    assert ran[2:] == [Choice("expand_first")] * 2


def test_what_was_measured_runs(cache, ran):
    table.write(cache, [record()], "")
    forms.forget()
    expected = Choice("expand_add", None, "tuned")
    y = lora_linear(*layer(), scaling=1.0)
    y.sum().backward()
    assert ran == [expected, Choice("expand_first")]
    # Another shape, token count, rank, dtype: the default. Dropout is no matter in the forward, it is in the backward.
    table.write(
        cache, [record(), record(product="backward"), record(form="expand_first", product="backward", dropout=True)], ""
    )
    forms.forget()
    del ran[:]
    lora_linear(*layer(), scaling=1.0, dropout=Dropout(0.5, 1)).sum().backward()
    assert ran == [expected, Choice("expand_first", None, "tuned")]
    del ran[:]
    lora_linear(*layer(), scaling=1.0).sum().backward()
    assert ran == [expected] * 2
    del ran[:]
    for sizes in (((9,), 12, 9, 3), ((4,), 12, 9, 3), ((7,), 9, 12, 3), ((7,), 12, 9, 17)):
        lora_linear(*make(*sizes), scaling=1.0)
    lora_linear(*make((7,), 12, 9, 3, torch.float64), scaling=1.0)
    assert ran == [Choice("expand_first")] * 5
    del ran[:]
    for sizes in (((5,), 12, 9, 1), ((2, 4), 12, 9, 16)):
        lora_linear(*make(*sizes), scaling=1.0)
    assert ran == [expected] * 2


def test_a_frozen_pair_counts_as_rank(cache, ran):
    table.write(cache, [record(rank=32)], "")
    forms.forget()
    x, weight, bias, a, b = make((7,), 12, 9, 14)
    lora_linear(x, weight, bias, a, b, scaling=1.0, extra=make_extra(12, 9, 0.5, 3))
    assert ran == [Choice("expand_add", None, "tuned")]


def test_a_measured_kernel_runs_where_it_can(cache, ran):
    pytest.importorskip("triton")
    table.write(cache, [record("gemm", chosen=config.SINGLE.name)], "")
    forms.forget()
    x, weight, bias, a, b = layer()
    results = [lora_linear(x, weight, bias, a, b, scaling=1.0, backend=name) for name in ("triton", "torch")]
    assert ran == [Choice("gemm", config.SINGLE, "tuned"), Choice("expand_first")]
    torch.testing.assert_close(*results)


def test_a_measured_configuration_reaches_the_kernel(cache, monkeypatch):
    pytest.importorskip("triton")
    from lora_kernels.ops.lora_linear import kernel

    found, launch = [], kernel.linear
    monkeypatch.setattr(kernel, "linear", lambda *args: (found.append(args[-1]), launch(*args)))
    table.write(cache, [record("gemm", chosen=config.SQUARE.name, dtype="float16", tokens=16, n=32, m=16)], "")
    forms.forget()
    tensors = [each.detach() for each in make((16,), 32, 16, 8, torch.float16)]
    lora_linear(*tensors, scaling=1.0, backend="triton")
    with use_form("gemm"):
        lora_linear(*tensors, scaling=1.0, backend="triton")
    assert found == [config.SQUARE, config.SMALL]


def test_a_forced_form_says_why_it_cannot_run(monkeypatch):
    with use_form("gemm"):
        with pytest.raises(RuntimeError, match="'gemm' cannot run: .*backend 'torch'"):
            lora_linear(*layer(), scaling=1.0, backend="torch")
        with pytest.raises(RuntimeError, match="takes no float64"):
            lora_linear(*make((7,), 12, 9, 3, torch.float64), scaling=1.0)
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(RuntimeError, match="only under TRITON_INTERPRET=1|triton cannot be imported"):
            lora_linear(*layer(), scaling=1.0)
    with pytest.raises(ValueError, match="form is 'fast', but must be one of 'auto', 'expand_first'"), use_form("fast"):
        pass


def test_forms_nest_and_end(ran, cache):
    run = lambda: lora_linear(*(each.detach() for each in layer()), scaling=1.0)  # noqa: E731
    with use_form("expand_add"):
        run()
        with use_form("auto"):
            run()
        with pytest.raises(KeyError), use_form("expand_first"):
            raise KeyError
        run()
    run()
    assert [(each.form, each.origin) for each in ran] == [
        ("expand_add", "forced"),
        ("expand_first", "default"),
        ("expand_add", "forced"),
        ("expand_first", "default"),
    ]


def test_the_users_table_goes_before_the_one_that_ships(cache, ran, tmp_path, monkeypatch):
    shipped = tmp_path / "shipped.json"
    table.write(shipped, [record("expand_add"), record("expand_add", product="backward")], "")
    monkeypatch.setattr(table, "PACKAGED", shipped)
    table.write(cache, [record("expand_first")], "")
    forms.forget()
    lora_linear(*layer(), scaling=1.0).sum().backward()
    assert ran == [Choice("expand_first", None, "tuned"), Choice("expand_add", None, "shipped")]


def test_other_versions_and_chips_do_not_count(cache, ran):
    mine = table.versions()
    other = [{**mine, "torch": "1.13.0"}, {**mine, "triton": "2.0.0"}, {**mine, "triton": None}, {}]
    major, minor, rest = mine["torch"].split(".", 2)
    table.write(cache, [record(versions=each) for each in other] + [record(chip="NVIDIA Z1")], "")
    forms.forget()
    lora_linear(*layer(), scaling=1.0)
    assert ran == [Choice("expand_first")]
    assert forms.tables().counts[cache] == (0, 4, 1)
    # Another patch, or build, of the same minor version is fine; a configuration that no longer ships is not.
    close = {**mine, "torch": f"{major}.{minor}.99+cu999"}
    gone = record("gemm", chosen="1x2x3-r4-w5-s6", product="backward")
    table.write(cache, [record(versions=close), gone], "")
    forms.forget()
    lora_linear(*layer(), scaling=1.0)
    assert ran[1:] == [Choice("expand_add", None, "tuned")] and forms.tables().counts[cache] == (1, 1, 0)


def broken(**changes):
    entry = {
        **dataclasses.asdict(key()),
        "form": "expand_add",
        "config": None,
        "seconds": {},
        "versions": {},
        **changes,
    }
    return json.dumps({"format": 1, "records": [{name: value for name, value in entry.items() if value != "missing"}]})


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "Expecting value"),
        ("[1]", "no {"),
        ('{"format": 1}', "no {"),
        ('{"records": []}', "format is None, but this version reads 1"),
        ('{"format": 2, "records": []}', "format is 2, but this version reads 1"),
        ('{"format": 1, "records": [3]}', "record 0 is no object"),
        (broken(m="missing"), "record 0: m is None"),
        (broken(m="9"), "record 0: m is '9', but must be int"),
        (broken(m=True), "record 0: m is True"),
        (broken(dropout=1), "record 0: dropout is 1"),
        (broken(form="magic"), "form is 'magic', but must be one of expand_first"),
        (broken(form="gemm"), "a gemm has a config"),
        (broken(config=config.WIDE.name), "a gemm has a config"),
        (broken(product="sideways"), "product is 'sideways'"),
        (broken(dtype="int8"), "dtype is 'int8'"),
        (broken(tokens=7), "must be powers of two"),
        (broken(rank=8), "must be powers of two"),
        (broken(seconds={"mm": "1"}), "seconds of mm are '1'"),
        (broken(seconds={"mm": float("nan")}), "seconds of mm are nan"),
        (broken(versions={"torch": 2}), "versions must be texts"),
        (broken(colour="red"), "unknown fields: colour"),
    ],
)
def test_a_malformed_table_is_warned_of_once_and_not_used(text, reason, cache, ran):
    cache.write_text(text)
    with pytest.warns(RuntimeWarning) as caught:
        for _ in range(3):
            lora_linear(*(each.detach() for each in layer()), scaling=1.0)
    ours = [str(each.message) for each in caught if "table of measured forms" in str(each.message)]
    assert len(ours) == 1 and str(cache) in ours[0] and reason in ours[0] and "default form" in ours[0]
    assert ran == [Choice("expand_first")] * 3
    assert reason in forms.tables().problems[cache]


def test_a_table_that_cannot_be_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))  # a folder
    forms.forget()
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        assert forms.tables().entries == {}
    forms.forget()


def test_the_table_that_ships_is_in_order():
    for each in table.read(table.PACKAGED):
        assert each.seconds and each.versions["torch"] and (each.config is None or each.config in config.CONFIGS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forms.forget()
        forms.tables()


def test_files_are_whole_or_not_there(tmp_path):
    file = tmp_path / "deep" / "table.json"
    one, two = record(), record("gemm", chosen=config.WIDE.name, product="backward")
    table.write(file, [one, two], "a note")
    assert table.read(file) == [one, two] and json.loads(file.read_text())["note"] == "a note"
    before = file.read_text()
    with pytest.raises(TypeError):
        table.write(file, [dataclasses.replace(one, seconds={"mm": object()})], "")
    assert file.read_text() == before and list(file.parent.iterdir()) == [file]


def test_new_records_take_the_place_of_old_ones():
    mine = table.versions()
    patch, other = {**mine, "lora_kernels": "0"}, {**mine, "torch": "1.0"}
    old = [record("expand_first", versions=patch), record(versions=other), record(tokens=16)]
    found = table.merged(old, [record("expand_add")])
    assert [each.form for each in found if each.key == key()] == ["expand_add", "expand_add"]
    assert found[0].versions == mine and old[1] in found and old[2] in found and len(found) == 3


def test_where_the_table_is(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_KERNELS_CACHE", "~/mine.json")
    assert table.cache_file().name == "mine.json" and table.cache_file().is_absolute()
    monkeypatch.delenv("LORA_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert table.cache_file() == tmp_path / "lora_kernels" / "tuned.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert table.cache_file().parts[-3:] == (".cache", "lora_kernels", "tuned.json")


def test_a_write_that_fails_leaves_nothing_behind(cache, monkeypatch):
    table.write(cache, [record()], "")
    monkeypatch.setattr(table.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        table.write(cache, [], "")
    assert [each.name for each in cache.parent.iterdir()] == [cache.name] and len(table.read(cache)) == 1


def test_buckets():
    assert [table.bucket(each) for each in (0, 1, 2, 3, 8, 9, 8192, 32768, 10**6)] == [
        1, 1, 2, 4, 8, 16, 8192, 32768, 32768,
    ]  # fmt: skip
    assert [table.pad_rank(each) for each in (0, 1, 16, 17, 64, 65)] == [16, 16, 16, 32, 64, 128]


@pytest.mark.parametrize("form", ["expand_first", "expand_add"])
def test_compiles_with_the_form_looked_up_when_it_runs(form, cache, ran):
    """Another number of tokens takes its own form without another compilation; checkpoints take the same one twice."""
    entries = [record(form, product=product, tokens=tokens) for product in table.PRODUCTS for tokens in (8, 16)]
    table.write(cache, [*entries, record("expand_add", tokens=32)], "")
    forms.forget()
    _, weight, bias, a, b = (each.detach() for each in layer())
    run = lambda x: lora_linear(x, weight, bias, a, b, scaling=0.5).square().sum()  # noqa: E731
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(run, fullgraph=True, backend=count, dynamic=True)
    made = []
    for tokens, expected in ((7, form), (13, form), (20, "expand_add")):
        x = torch.randn(tokens, 12, requires_grad=True)
        del ran[:]
        compiled(x).backward()
        assert ran[0].form == expected and len(ran) == 2
        made.append(len(graphs))
        (truth,) = torch.autograd.grad(run(x), x)
        torch.testing.assert_close(x.grad, truth)
    assert made[2] == made[0]
    x = torch.randn(7, 12, requires_grad=True)
    del ran[:]
    checkpoint(run, x, use_reentrant=False).backward()
    assert ran == [Choice(form, None, "tuned")] * 3
