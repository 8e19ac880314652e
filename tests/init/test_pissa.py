import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_kernels.init import PiSSA, resolve_method
from lora_kernels.init.problem import BaseLayer


def matrix(m, n, decay=0.9):
    k = min(m, n)
    u, v = torch.linalg.qr(torch.randn(m, k)).Q, torch.linalg.qr(torch.randn(n, k)).Q
    return (u * decay ** torch.arange(k)) @ v.mT


def bases(weights, scaling=2.0):
    return {name: BaseLayer(lambda w=w: w, scaling) for name, w in weights.items()}


@pytest.mark.parametrize("shape", [(24, 37), (37, 24), (7, 5)])
def test_same_start_as_peft(shape):
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    model[0].weight.data = matrix(*shape)
    weight = model[0].weight.data.clone()
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights="pissa")
    theirs = get_peft_model(copy.deepcopy(model), config).base_model.model[0]
    found = PiSSA(n_iter=None).factors({}, {"l": 4}, base=bases({"l": weight}, 1.5))["l"]
    a, b = found.factors.A, found.factors.B
    peft_a, peft_b = theirs.lora_A["default"].weight.data, theirs.lora_B["default"].weight.data
    torch.testing.assert_close(1.5 * b @ a, 1.5 * peft_b @ peft_a, rtol=0, atol=2e-6)
    torch.testing.assert_close(weight - 1.5 * b @ a, theirs.get_base_layer().weight.data, rtol=0, atol=2e-6)
    # The same split and the same vectors, up to signs.
    signs = (a * peft_a).sum(-1).sign()
    torch.testing.assert_close(a, peft_a * signs[:, None], rtol=0, atol=1e-5)
    torch.testing.assert_close(b, peft_b * signs, rtol=0, atol=1e-5)
    assert found.solver == "svd" and found.residual == pytest.approx(0.9**4, rel=1e-4)
    assert math.isnan(found.explained_variance) and found.notes == ()


def test_randomized_is_close_and_its_bound_holds():
    weight = matrix(300, 200, decay=0.93)
    full = PiSSA(n_iter=None).factors({}, {"l": 8}, base=bases({"l": weight}))["l"]
    fast = PiSSA(n_iter=4).factors({}, {"l": 8}, base=bases({"l": weight}))["l"]
    torch.testing.assert_close(fast.factors.B @ fast.factors.A, full.factors.B @ full.factors.A, rtol=0, atol=1e-4)
    left = weight - 2 * fast.factors.B @ fast.factors.A  # and the norm of the weight is 1
    assert float(torch.linalg.matrix_norm(left, ord=2)) <= fast.residual <= 4 * float(left.norm())
    assert fast.solver == "krylov"


@pytest.mark.parametrize("n_iter", [None, 2])
def test_batches_and_order_change_nothing(n_iter, monkeypatch):
    weights = {"a": matrix(20, 30), "b": matrix(31, 20), "c": matrix(20, 30), "d": matrix(20, 30)}
    ranks = {"a": 3, "b": 3, "c": 3, "d": 5}
    method = PiSSA(n_iter=n_iter)
    together = method.factors({}, ranks, base=bases(weights))
    again = method.factors({}, ranks, base=bases(weights))
    monkeypatch.setattr("lora_kernels.init.problem._BATCH_BYTES", {"cpu": 1})
    alone = method.factors({}, ranks, base=bases(weights))
    assert list(together) == list(ranks)
    for name, rank in ranks.items():
        one, two = together[name].factors, again[name].factors
        assert torch.equal(one.A, two.A) and torch.equal(one.B, two.B) and one.rank == rank
        torch.testing.assert_close(alone[name].factors.A, one.A, rtol=0, atol=1e-5)


def test_a_low_rank_weight_is_said():
    found = PiSSA(n_iter=None).factors({}, {"l": 2}, base=bases({"l": torch.zeros(5, 6)}))["l"]
    assert "2 components have singular value zero" in found.notes[0] and found.residual == 0
    assert float(found.factors.A.abs().max()) == 0 == float(found.factors.B.abs().max())


def test_errors():
    weight = matrix(6, 9)
    with pytest.raises(ValueError, match="starts from the base weight, but base has no layer l"):
        PiSSA(n_iter=None).factors({}, {"l": 2})
    with pytest.raises(ValueError, match=r"layer l has rank 7, but must be between 1 and min\(m, n\) = 6"):
        PiSSA(n_iter=None).factors({}, {"l": 7}, base=bases({"l": weight}))
    with pytest.raises(ValueError, match="the base weight of layer l holds NaN"):
        PiSSA(n_iter=None).factors({}, {"l": 2}, base=bases({"l": weight.log()}))
    with pytest.raises(ValueError, match=r"layer l has scaling 0\.0, but must be positive"):
        PiSSA(n_iter=None).factors({}, {"l": 2}, base=bases({"l": weight}, 0.0))
    with pytest.raises(ValueError, match="n_iter is -1"):
        PiSSA(n_iter=-1)
    assert resolve_method("pissa") == PiSSA() and PiSSA.offsets_base


def test_five_rounds_catch_as_much_as_pefts_sixteen_iterations():
    torch.manual_seed(0)
    weight = torch.randn(700, 640)
    theirs = float(torch.svd_lowrank(weight, 16, niter=16)[1].square().sum())
    caught = {}
    for rounds in (3, 5):
        factors = PiSSA(n_iter=rounds).factors({}, {"l": 16}, base=bases({"l": weight}, 1.0))["l"].factors
        caught[rounds] = float((factors.B @ factors.A).square().sum())
    assert caught[3] < 0.98 * theirs and caught[5] > 0.998 * theirs


def test_the_default_rounds_catch_all_but_little_where_singular_values_hardly_decay():
    torch.manual_seed(0)
    weight = torch.randn(700, 640)
    found = PiSSA().factors({}, {"l": 16}, base=bases({"l": weight}, 1.0))["l"]
    caught = float((found.factors.B @ found.factors.A).square().sum())
    best = float(torch.linalg.svdvals(weight)[:16].square().sum())
    assert found.solver == "krylov" and 0 <= 1 - caught / best < 2e-3
