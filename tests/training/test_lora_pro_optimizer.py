"""LoRA-Pro as a torch optimizer: groups, state, resuming, closures, schedulers, scalers, and what it refuses."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.training.lora_pro.buckets import mix
from tests.conftest import relative_error
from tests.training.lora_pro_cases import SHAPES, factors, full_gradients, optimizer_for, set_gradients

MODES = ["efficient", "full"]


def flat(pairs):
    return [each for pair in pairs for each in pair]


def values(parameters):
    return [each.detach().clone() for each in parameters]


def same(one, other):
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def extras(dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((5, 7), (11,), ())]


def set_extra_gradients(parameters, step):
    generator = torch.Generator().manual_seed(2000 + step)
    for each in parameters:
        each.grad = torch.randn(each.shape, generator=generator).to(each.dtype)


class Run:
    """Pairs and other parameters under one optimizer."""

    def __init__(self, dtype=torch.float32, b_scale=0.0, **options):
        self.pairs, self.others = factors(dtype=dtype, b_scale=b_scale), extras(dtype)
        groups = [{"pairs": self.pairs, "scaling": 1.5}, {"params": self.others, "lr": 0.01, "weight_decay": 0.2}]
        self.optimizer = lk.training.LoraPro(groups, lr=0.02, weight_decay=0.1, **options)

    def step(self, number):
        set_gradients(self.pairs, 1.5, number)
        set_extra_gradients(self.others, number)
        self.optimizer.step()

    def values(self):
        return values([*flat(self.pairs), *self.others])


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# -- other parameters: AdamW -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, None])
def test_other_parameters_get_torchs_adamw(fused):
    run, copies = Run(), extras()
    stock = torch.optim.AdamW(copies, lr=0.01, weight_decay=0.2, fused=fused)
    for step in range(5):
        run.step(step)
        set_extra_gradients(copies, step)
        stock.step()
    for one, other in zip(run.others, copies, strict=True):
        assert torch.equal(one, other) if fused else relative_error(one.detach(), other.detach()) < 1e-6


def test_adamw_looks_at_strides():
    """The fused kernel of torch does not; other orders of memory take another road."""
    one, other = (
        nn.Parameter(torch.arange(12.0).view(3, 4).T.clone(memory_format=torch.preserve_format)) for _ in range(2)
    )
    assert not one.is_contiguous()
    gradient = torch.randn(4, 3)
    optimizers = lk.training.LoraPro([one], lr=0.1), torch.optim.AdamW([other], lr=0.1, weight_decay=0.0)
    for parameter, optimizer in zip((one, other), optimizers, strict=True):
        parameter.grad = gradient.clone()
        optimizer.step()
    assert relative_error(one.detach(), other.detach()) < 1e-6


def test_moments_that_were_saved_in_another_order_of_memory():
    one, other = Run(), Run()
    for each in (one, other):
        each.step(0)
    saved = copy.deepcopy(one.optimizer.state_dict())
    for each in saved["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            if each[key].dim() == 2:
                each[key] = each[key].T.contiguous().T
    one.optimizer.load_state_dict(saved)
    for each in (one, other):
        each.step(1)
    assert same(one.values(), other.values())


def test_short_parameters_without_a_pair_keep_float32_moments():
    (one,) = extras(torch.bfloat16)[:1]
    wide = nn.Parameter(one.detach().float())
    optimizers = lk.training.LoraPro([one], lr=0.1), torch.optim.AdamW([wide], lr=0.1, weight_decay=0.0, fused=True)
    set_extra_gradients([one], 0)
    wide.grad = one.grad.float()
    for each in optimizers:
        each.step()
    assert optimizers[0].state[one]["exp_avg"].dtype == torch.float32
    assert torch.equal(one, wide.bfloat16())


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_state_is_keyed_by_parameter_and_of_the_right_size(mode):
    run = Run(mode=mode)
    assert not run.optimizer.state
    run.step(0)
    for (m, n, r), (a, b) in zip(SHAPES, run.pairs, strict=True):
        kept = {key: tuple(value.shape) for key, value in run.optimizer.state[b].items()}
        expected = (m, n) if mode == "full" else (m, r)
        assert kept == {"step": (), "exp_avg": expected, "exp_avg_sq": expected}
        if mode == "full":
            assert run.optimizer.state[a].keys() == {"step"}
        else:
            assert run.optimizer.state[a]["exp_avg"].shape == (r, n)
    assert float(run.optimizer.state[run.others[0]]["step"]) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"mode": "full"}, {"mode": "full", "state_dtype": torch.bfloat16}])
def test_a_resumed_run_goes_on_to_the_same_bits(options, dtype):
    if "state_dtype" in options and dtype == torch.float64:
        with pytest.raises(ValueError, match="state_dtype is torch.bfloat16, but .* is of float64"):
            Run(dtype, **options)
        return
    first = Run(dtype, **options)
    torch.manual_seed(0)
    through = Run(dtype, **options)
    for step in range(3):
        first.step(step)
    saved = through_a_file(first.optimizer.state_dict())
    torch.manual_seed(77)  # another seed of the moments' rounding, until the state is loaded
    second = Run(dtype, **options)
    for mine, theirs in zip([*flat(second.pairs), *second.others], first.values(), strict=True):
        mine.data.copy_(theirs)
    second.optimizer.load_state_dict(saved)
    state = second.optimizer.state[second.pairs[0][1]]
    wanted = {torch.float64: torch.float64}.get(dtype, torch.float32)
    assert state["exp_avg"].dtype == options.get("state_dtype", wanted)
    for step in range(3, 6):
        second.step(step)
    for step in range(6):
        through.step(step)
    assert same(through.values(), second.values())
    assert not same(first.values(), second.values())


def test_bfloat16_moments_are_rounded_with_a_seed_of_their_own_per_pair_and_run():
    def moments(seed):
        torch.manual_seed(seed)
        shapes = [(13, 17, 4)] * 2
        pairs = factors(shapes)
        with torch.no_grad():
            for one, other in zip(*pairs, strict=True):
                other.copy_(one)
        optimizer = optimizer_for(pairs, mode="full", state_dtype=torch.bfloat16)
        for step in range(2):
            for a, b in pairs:
                set_gradients([(a, b)], 1.5, step, shapes[:1])
            optimizer.step()
        return [optimizer.state[b]["exp_avg"] for _, b in pairs]

    first, again, other = moments(1), moments(1), moments(2)
    assert same(first, again) and not same(first, other)
    assert not torch.equal(first[0], first[1]) and relative_error(first[0], first[1]) < 0.02


def test_every_pair_has_its_own_seed():
    seeds = {mix(seed, pair) for seed in (0, 1, 2**62) for pair in range(500)}
    assert len(seeds) == 1500 and min(seeds) >= 0 and max(seeds) < 2**63


def test_float32_moments_draw_no_seed():
    state = torch.get_rng_state()
    Run(mode="full").step(0)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("mode", MODES)
def test_copies_and_pickles_go_on_by_themselves(mode):
    run = Run(mode=mode)
    run.step(0)
    holder = copy.deepcopy(run)
    other = pickle.loads(pickle.dumps(run))
    before = run.values()
    for each in (holder, other):
        each.step(1)
    assert same(run.values(), before)
    run.step(1)
    assert same(run.values(), holder.values()) and same(run.values(), other.values())


def test_state_of_the_other_mode_is_refused_and_changes_nothing():
    one, other = Run(mode="full"), Run(mode="efficient")
    for each in (one, other):
        each.step(0)
    for mine, theirs in ((one, other), (other, one)):
        kept = mine.optimizer.state[mine.pairs[0][1]]["exp_avg"].clone()
        with pytest.raises(ValueError, match="another mode"):
            mine.optimizer.load_state_dict(theirs.optimizer.state_dict())
        assert torch.equal(kept, mine.optimizer.state[mine.pairs[0][1]]["exp_avg"])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        one.optimizer.load_state_dict(optimizer_for(factors(), mode="full").state_dict())


def test_hooks_of_users_see_what_is_loaded_and_may_change_it():
    one, other = Run(torch.bfloat16), Run(torch.bfloat16)
    one.step(0)
    saved = copy.deepcopy(one.optimizer.state_dict())

    def double(_, state):
        return {**state, "state": {k: {**v, "exp_avg": 2 * v["exp_avg"]} for k, v in state["state"].items()}}

    other.optimizer.register_load_state_dict_pre_hook(double)
    other.optimizer.load_state_dict(saved)
    mine, theirs = (each.optimizer.state[each.pairs[0][1]]["exp_avg"] for each in (one, other))
    assert torch.equal(2 * mine, theirs)


def test_zero_grad_and_parameters_exchanged_by_wrappers():
    run, other = Run(), Run()
    run.step(0)
    run.optimizer.zero_grad()
    assert all(each.grad is None for each in [*flat(run.pairs), *run.others])
    before = run.values()
    run.optimizer.step()  # no gradients: nothing happens
    assert same(before, run.values())
    # accelerate puts sharded parameters into the groups of a finished optimizer.
    other.pairs = factors(b_scale=0.0)
    other.optimizer.param_groups[0]["params"] = flat(other.pairs)
    other.step(0)
    assert same(other.values(), before)


# -- a training loop's habits ------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.base = nn.Linear(9, 6)
        self.base.weight.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(3, 9) / 3), nn.Parameter(torch.zeros(6, 3))

    def forward(self, x):
        return self.base(x) + 2.0 * (x @ self.a.T) @ self.b.T


def layer_optimizer(layer, **options):
    groups = [{"pairs": [(layer.a, layer.b)], "scaling": 2.0}, {"params": [layer.base.bias]}]
    return lk.training.LoraPro(groups, **{"lr": 0.05, **options})


def data():
    generator = torch.Generator().manual_seed(6)
    return torch.randn(32, 9, generator=generator), torch.randn(32, 6, generator=generator)


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_falls_with_a_closure_and_the_closures_loss_comes_back(mode):
    layer, (x, y) = Layer(), data()
    optimizer, losses = layer_optimizer(layer, mode=mode), []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(layer(x), y)
        loss.backward()
        return loss

    for _ in range(40):
        losses.append(optimizer.step(closure).item())
    assert losses[-1] < 0.75 * losses[0] and all(losses[k + 10] < losses[k] for k in range(0, 30, 10))


@pytest.mark.parametrize("mode", MODES)
def test_accumulated_gradients_are_the_gradients_of_the_batch(mode):
    results = []
    for parts in (1, 4):
        layer, (x, y) = Layer(), data()
        optimizer = layer_optimizer(layer, mode=mode)
        for _ in range(3):
            optimizer.zero_grad()
            for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (nn.functional.mse_loss(layer(xs), ys) / parts).backward()
            optimizer.step()
        results.append([layer.a.detach(), layer.b.detach()])
    for one, other in zip(*results, strict=True):
        assert relative_error(one, other) < 1e-4


def test_schedulers_move_the_learning_rate_of_each_group():
    run = Run()
    scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 0.5**step)
    run.step(0)
    scheduler.step()
    before = run.values()
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.01, 0.005]
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    run.step(1)
    assert same(before, run.values())  # neither step nor decay


@pytest.mark.parametrize("mode", MODES)
def test_each_group_has_its_own_numbers(mode):
    one, other = factors(SHAPES[:1]), factors(SHAPES[:1])
    alone = [factors(SHAPES[:1]), factors(SHAPES[:1])]
    settings = [
        {"lr": 0.1, "betas": (0.5, 0.6), "eps": 1e-2, "weight_decay": 0.3},
        {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0},
    ]
    together = lk.training.LoraPro([{"pairs": one, "scaling": 1.5, **settings[0]}], lr=1.0, mode=mode)
    together.add_param_group({"pairs": other, "scaling": 0.5, **settings[1]})
    single = [
        optimizer_for(alone[0], 1.5, mode=mode, **settings[0]),
        optimizer_for(alone[1], 0.5, mode=mode, **settings[1]),
    ]
    for step in range(3):
        for pairs, scaling in ((one, 1.5), (other, 0.5), (alone[0], 1.5), (alone[1], 0.5)):
            set_gradients(pairs, scaling, step, SHAPES[:1])
        for each in (together, *single):
            each.step()
    for mine, theirs in zip((*one, *other), (*alone[0], *alone[1]), strict=True):
        for x, y in zip(mine, theirs, strict=True):
            assert relative_error(x.detach(), y.detach()) < 1e-6
    assert relative_error(one[0][1].detach(), other[0][1].detach()) > 1e-2


def test_groups_can_be_added_of_both_kinds():
    run, late, other = Run(), factors([(8, 6, 2)]), nn.Parameter(torch.ones(3))
    run.step(0)
    group = {"pairs": late, "scaling": 3.0}
    run.optimizer.add_param_group(group)
    assert group.keys() == {"pairs", "scaling"}  # the caller's own stays as it is
    run.optimizer.add_param_group({"params": [other]})
    before = values([*late[0], other])
    set_gradients(late, 3.0, 0, [(8, 6, 2)])
    other.grad = torch.ones(3)
    run.step(1)
    assert not any(torch.equal(x, y) for x, y in zip(before, values([*late[0], other]), strict=True))


def test_scaling_may_be_a_function_that_is_asked_at_every_step():
    now = {"scaling": 2.0}
    pairs, fixed = factors(SHAPES[:1]), factors(SHAPES[:1])
    optimizer, other = optimizer_for(pairs, lambda: now["scaling"]), optimizer_for(fixed, 2.0)
    for step, scaling in enumerate((2.0, 5.0)):
        now["scaling"] = scaling
        for each in (pairs, fixed):
            set_gradients(each, scaling, step, SHAPES[:1])
        for each in (optimizer, other):
            each.step()
        assert same(values(flat(pairs)), values(flat(fixed))) == (step == 0)
    now["scaling"] = 0.0
    with pytest.raises(ValueError, match="scaling of pair 0 is 0.0"):
        optimizer.step()


class CPUScaler(torch.amp.GradScaler):
    def __init__(self):
        super().__init__("cpu", init_scale=2.0**12, growth_interval=2)


@pytest.mark.parametrize("mode", MODES)
def test_gradscaler_unscales_first_and_skips_steps_that_overflow(mode):
    results = []
    for scaler in (None, CPUScaler()):
        layer, (x, y) = Layer(), data()
        optimizer = layer_optimizer(layer, mode=mode)
        for step in range(4):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(layer(x), y)
            if scaler is None:
                loss.backward()
                nn.utils.clip_grad_norm_(layer.parameters(), 0.5)
                optimizer.step()
                continue
            scaler.scale(loss).backward()
            if step == 2:  # an overflow: the same batch comes again
                kept, gradient = layer.b.detach().clone(), layer.b.grad.clone()
                layer.b.grad[0, 0] = float("inf")
                scaler.step(optimizer)
                scaler.update()
                assert torch.equal(kept, layer.b)
                optimizer.zero_grad()
                scaler.scale(nn.functional.mse_loss(layer(x), y)).backward()
                assert torch.equal(gradient, 2 * layer.b.grad)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(layer.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        results.append([layer.a.detach(), layer.b.detach()])
    for one, other in zip(*results, strict=True):
        assert relative_error(one, other) < 1e-4


# -- pairs in ordinary groups ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_pairs_are_found_in_any_groups(mode):
    one, other = Run(mode=mode), Run(mode=mode)
    pairs = other.pairs
    groups = [
        {"params": [*(b for _, b in pairs), other.others[0]], "weight_decay": 0.1},
        {"params": [other.others[1], *(a for a, _ in pairs), other.others[2]], "weight_decay": 0.1},
        {"params": []},
    ]
    other.optimizer = lk.training.LoraPro(groups, 0.02, mode=mode, pairs=[(a, b, 1.5) for a, b in pairs])
    for step in range(3):
        one.step(step)
        other.step(step)
    for mine, theirs in zip(flat(one.pairs), flat(other.pairs), strict=True):
        assert torch.equal(mine, theirs)
    other.optimizer.param_groups[1]["lr"] = 0.0  # that of all A
    before = values(flat(pairs))
    other.step(3)
    moved = [not torch.equal(x, y) for x, y in zip(before, values(flat(pairs)), strict=True)]
    assert moved == [False, True] * len(pairs)


# -- what it refuses ---------------------------------------------------------------------------------------------------


def parameter(*shape, dtype=torch.float32, device="cpu"):
    return nn.Parameter(torch.ones(*shape, dtype=dtype, device=device))


def group(a, b, **options):
    return [{"pairs": [(a, b)], "scaling": 1.0, **options}]


A, B, SQUARE = parameter(2, 5), parameter(4, 2), parameter(3, 3)


@pytest.mark.parametrize(
    ("groups", "options", "error", "message"),
    [
        (group(A, parameter(4, 3)), {}, ValueError, r"B of pairs\[0\] has shape \(4, 3\)"),
        (group(A, parameter(4, 2, 1)), {}, ValueError, r"B of pairs\[0\] has shape"),
        (group(parameter(2), B), {}, ValueError, r"A of pairs\[0\] has shape"),
        (group(parameter(0, 5), parameter(4, 0)), {}, ValueError, "no size may be 0"),
        (group(A, parameter(4, 2, dtype=torch.float64)), {}, TypeError, r"B of pairs\[0\] has dtype float64"),
        (group(torch.ones(2, 5, dtype=torch.int32), B), {}, TypeError, r"A of pairs\[0\] has dtype int32"),
        (group(A, parameter(4, 2, device="meta")), {}, ValueError, r"B of pairs\[0\] is on meta"),
        (group("A", B), {}, TypeError, r"A of pairs\[0\] must be a torch.Tensor"),
        ([{"pairs": [(A, B, 2.0)], "scaling": 1.0}], {}, ValueError, r"pairs\[0\] has 3 entries"),
        ([{"pairs": [(A, B)]}], {}, ValueError, "needs its scaling"),
        ([{"pairs": [(A, B)], "scaling": 0.0}], {}, ValueError, "scaling is 0"),
        ([{"pairs": [(A, B)], "scaling": float("nan")}], {}, ValueError, "scaling is nan"),
        ([{"pairs": [(A, B)], "scaling": "2"}], {}, (TypeError, ValueError), "scaling"),
        ([{"pairs": [(A, B)], "scaling": [1.0, 2.0]}], {}, ValueError, "scaling has 2 entries"),
        ([{"pairs": [(A, B)], "params": [A], "scaling": 1.0}], {}, ValueError, "has both"),
        ([{"params": [A], "scaling": 1.0}], {}, ValueError, "scaling belongs to a group with pairs"),
        ([{"pairs": [(A, B), (A, B)], "scaling": 1.0}], {}, ValueError, "twice"),
        (group(parameter(2, 2), None), {}, TypeError, "B of"),
        (group(SQUARE, SQUARE), {}, ValueError, r"A and B of pairs\[0\] are the same parameter"),
        ([*group(A, B), {"params": [B]}], {}, ValueError, "more than one parameter group"),
        ([*group(A, B), *group(A, parameter(4, 2))], {}, ValueError, "more than one parameter group"),
        (group(A, B), {"pairs": [(A, B, 1.0)]}, ValueError, r"A of pairs\[0\] is in two pairs"),
        ([A], {"pairs": [(A, B, 1.0)]}, ValueError, r"B of pairs\[0\] is in no parameter group"),
        ([A, B], {"pairs": [(A, B, 1.0)] * 2}, ValueError, r"A of pairs\[1\] is in two pairs"),
        ([A, B], {"pairs": [(B, A, 1.0)]}, ValueError, "has shape"),
        (group(A, B), {"mode": "fast"}, ValueError, "mode is 'fast', but must be one of 'efficient', 'full'"),
        (group(A, B), {"lr": float("nan")}, ValueError, "lr is nan"),
        (group(A, B), {"lr": float("inf")}, ValueError, "lr is inf"),
        (group(A, B), {"lr": -1.0}, ValueError, "lr is -1.0"),
        (group(A, B), {"lr": "1e-3"}, TypeError, "lr must be a number"),
        (group(A, B), {"lr": torch.ones(2)}, ValueError, "lr has shape"),
        (group(A, B, lr=float("inf")), {}, ValueError, "lr is inf"),
        (group(A, B), {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] is 1.0"),
        (group(A, B), {"betas": 0.9}, ValueError, "betas is 0.9"),
        (group(A, B), {"eps": -1e-8}, ValueError, "eps is"),
        (group(A, B), {"eps": 0.0, "mode": "full"}, ValueError, "eps is 0, but must be above 0"),
        (group(A, B), {"weight_decay": -0.1}, ValueError, "weight_decay is"),
        (group(A, B), {"damping": -1e-8}, ValueError, "damping is"),
        (group(A, B), {"state_dtype": torch.float16}, ValueError, "state_dtype is torch.float16"),
        (group(A, B), {"state_dtype": torch.bfloat16}, ValueError, 'needs mode="full"'),
        ([], {}, ValueError, "empty parameter list"),
        ([A, [B]], {}, TypeError, "can only optimize Tensors"),
    ],
)
def test_bad_arguments(groups, options, error, message):
    with pytest.raises(error, match=message):
        lk.training.LoraPro(groups, **{"lr": 1e-3, **options})


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    run = Run()
    with pytest.raises(ValueError, match="more than one parameter group"):
        run.optimizer.add_param_group({"pairs": [run.pairs[0]], "scaling": 1.0})
    with pytest.raises(TypeError, match="param_group must be a dict"):
        run.optimizer.add_param_group([A])
    run.step(0)
    assert len(run.optimizer.param_groups) == 2 and len(run.optimizer._pairs) == len(SHAPES)


def test_gradients_that_cannot_be_used():
    pairs = factors(SHAPES[:2])
    optimizer = optimizer_for(pairs)
    set_gradients(pairs, 1.5, 0, SHAPES[:2])
    before = values(flat(pairs))
    pairs[0][0].grad = pairs[0][1].grad = None
    optimizer.step()  # a pair without gradients is skipped
    assert [torch.equal(x, y) for x, y in zip(before, values(flat(pairs)), strict=True)] == [True, True, False, False]
    before = values(flat(pairs))
    for which in range(2):
        pairs[0][which].grad, pairs[0][1 - which].grad = torch.zeros_like(pairs[0][which]), None
        with pytest.raises(ValueError, match=f"pair 0 .* one factor only .{'BA'[which]} has none"):
            optimizer.step()
    set_gradients(pairs, 1.5, 0, SHAPES[:2])
    pairs[1][0].grad = pairs[1][0].grad.to_sparse()
    with pytest.raises(ValueError, match="gradient of A of pair 1 has layout torch.sparse_coo"):
        optimizer.step()
    assert same(before, values(flat(pairs)))
    other = nn.Parameter(torch.ones(3, 4))
    other.grad = torch.eye(3, 4).to_sparse()
    with pytest.raises(ValueError, match="gradient of parameter 0 of group 0 has layout"):
        lk.training.LoraPro([other], lr=0.1).step()


def test_factors_that_are_not_finite_are_named():
    pairs = factors(SHAPES)
    optimizer = optimizer_for(pairs)
    set_gradients(pairs, 1.5, 0)
    with torch.no_grad():
        pairs[3][0][0, 0] = float("nan")
    with pytest.raises(ValueError, match="pair 3 has factors with NaN"):
        optimizer.step()


def test_pairs_of_several_dtypes_in_one_optimizer():
    dtypes = torch.float32, torch.float64, torch.bfloat16, torch.float64
    pairs = [factors(SHAPES[:1], dtype)[0] for dtype in dtypes]
    alone = [factors(SHAPES[:1], dtype)[0] for dtype in dtypes]
    optimizers = [optimizer_for(pairs), *(optimizer_for([each]) for each in alone)]
    for each in (*pairs, *alone):
        set_gradients([each], 1.5, 0, SHAPES[:1])
    for each in optimizers:
        each.step()
    for one, other in zip(flat(pairs), flat(alone), strict=True):
        assert one.dtype == other.dtype and relative_error(one.detach(), other.detach()) < 1e-6
    assert relative_error(pairs[1][0].detach(), alone[3][0].detach()) < 1e-14
    # What counts as lost depends on the working dtype: each has waves of its own.
    waves = [{each.parameters[0][0].dtype for each in wave} for wave in optimizers[0]._waves()]
    assert sorted(waves, key=len) == [{torch.float64}, {torch.float32, torch.bfloat16}]


def test_learning_rate_tensors():
    one, other = factors(SHAPES[:1]), factors(SHAPES[:1])
    for pairs, lr in ((one, 0.02), (other, torch.tensor(0.02, dtype=torch.float64))):
        set_gradients(pairs, 1.5, 0, SHAPES[:1])
        optimizer_for(pairs, lr=lr).step()
    assert same(values(flat(one)), values(flat(other)))
    assert len(full_gradients(0)) == len(SHAPES)
