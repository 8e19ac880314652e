"""What `test_launching.py` runs in processes where Triton compiles for a driver that launches nothing."""

import contextlib
import itertools
from unittest import mock

import peft
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

from lora_kernels import accelerate
from lora_kernels.ops import _backend, _launching, _reduce, _tiles, use_backend
from lora_kernels.ops._dropout import Mask
from lora_kernels.ops._launching import Constants, launch
from lora_kernels.ops._op import OPS
from lora_kernels.ops._rows import Selection
from lora_kernels.ops.covariance import kernel as covariance
from lora_kernels.ops.gradient_statistics import kernel as gradients
from lora_kernels.ops.grouped_lora import kernel as grouped
from lora_kernels.ops.lora_linear import kernel as linear
from lora_kernels.ops.lora_linear import passes
from lora_kernels.ops.lora_pro_adam import kernel as pro
from lora_kernels.ops.lora_pro_adam import op as pro_op
from lora_kernels.ops.lora_pro_adam.config import Adam
from lora_kernels.ops.random_matrix import kernel as draws
from lora_kernels.ops.random_matrix.reference import Omega
from lora_kernels.ops.sketch import kernel as sketch
from lora_kernels.ops.skinny import config
from lora_kernels.ops.skinny import kernel as skinny
from lora_kernels.ops.skinny import op as skinny_op
from lora_kernels.training import LoraPro
from tests.helpers.fake_gpu import fake_gpu

HALF, FLOAT = torch.bfloat16, torch.float32
SHRINK = {
    "TOKENS": 64, "COLUMNS": 64, "RANK": 16, "TRANSPOSED": False, "ALIGNED": False, "HAS_DROPOUT": False,
    "PRECISION": "ieee", "UPCAST": False,
}  # fmt: skip


def calls():
    """Arguments of `shrink_kernel` that differ in everything that Triton specialises on."""
    memory = {dtype: torch.zeros(512, dtype=dtype) for dtype in (HALF, FLOAT)}
    for dtype, other, offset, size, stride in itertools.product(
        memory, memory, (0, 1, 8), (1, 15, 16, 64, 2**31), (1, 16, 17)
    ):
        out, x, a = memory[other][:64], memory[dtype][offset : offset + 64], memory[dtype][:64]
        for tokens, factor in ((64, 1.0), (1, 0.5), (7, 0.5)):
            yield (out, x, a, x), (size, tokens, 16, 1, stride, factor, 0, -5)


def same_kernels_as_the_front_end():
    """A launch that is prepared runs the very kernel that the front end chooses for its arguments."""
    with fake_gpu() as launches:
        constants, prepared = Constants(4, 3, **SHRINK), 0
        for _ in range(2):  # the second time, what can be prepared is
            for tensors, numbers in calls():
                launch(skinny.shrink_kernel, (3, 2, 1), tensors, numbers, constants)
                skinny.shrink_kernel[(3, 2, 1)](*tensors, *numbers, **constants.arguments)
                (one, grid, args), (other, expected, all_args) = launches[-2:]
                assert one is other and grid == expected == (3, 2, 1), numbers
                given = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
                assert given == [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in all_args]
                prepared += not isinstance(args[0], torch.Tensor)
        assert prepared > 100 and launches.compiled > 20


def same_arguments():
    """Every launch of the skinny products repeats: the second time it is prepared, with the same arguments."""
    mask = Mask(1000, torch.tensor([7]), 3)
    with fake_gpu() as launches:
        for tokens, rank, drop, dtype in itertools.product((64, 2048, 8192), (16, 12), (None, mask), (HALF, FLOAT)):
            x, t, y = torch.empty(tokens, 64, dtype=HALF), torch.empty(tokens, rank, dtype=HALF), torch.empty(64, 64)
            a, u = torch.empty(rank, 64, dtype=dtype), torch.empty_like(t)
            outs = torch.empty(rank, 64), torch.empty(64, rank)
            runs = []
            for _ in range(2):
                launches.clear()
                with (  # where parts and bits go
                    mock.patch.object(torch, "empty", lambda *_, y=y, **__: y),
                    mock.patch.object(skinny, "empty_bits", lambda _, y=y: y),
                ):
                    skinny.shrink(t, x, a, 0.5, drop)
                    skinny.tsreduce(outs[0], t, x, drop)
                    skinny.tsreduce_pair(outs, u, x, drop, t, x)
                    skinny.expand(x, t, a, x, None, drop)
                runs.append(list(launches))
            assert len(runs[0]) == len(runs[1]) >= 4
            for (one, grid, args), (other, expected, prepared) in zip(*runs, strict=True):
                assert one is other and grid == expected
                assert not any(isinstance(arg, torch.Tensor) for arg in prepared)
                assert [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args] == [*prepared]


def other_kernels():
    """All other kernels: the second of two equal calls does not go through the front end."""
    x, t, b, w = (torch.zeros(*shape, dtype=HALF) for shape in ((64, 64), (64, 16), (16, 64), (64, 64)))
    factor, sums, offsets = b.view(1, 16, 64), torch.zeros(1, 16, 64), torch.zeros(2, dtype=torch.int64)
    moments = torch.zeros(3, 64, 64), torch.zeros(3, 64, 64)
    square, column, index, weight = torch.zeros(64, 64), torch.zeros(64), torch.arange(64), torch.rand(64)
    tall, sketched = torch.zeros(2048, 64, dtype=HALF), torch.zeros(64, 16)
    left, right = torch.zeros(3, 64, 16), torch.zeros(3, 16, 64)
    adam = Adam(scaling=1.0, beta1=0.9, beta2=0.99, eps=1e-8, step=1, row_offset=0, row_step=64)
    launched: set[int] = set()
    calls = (
        lambda: covariance.covariance(square, x, Selection(index, weight), column),
        lambda: covariance.covariance(square, tall),
        lambda: gradients.gradient_statistics(square, x, x, index, weight),
        lambda: gradients.gradient_statistics(square, tall, tall, None, None),
        lambda: gradients.both(None, column, x, None, None, weight),
        lambda: sketch.sketch(sketched, tall, tall, Selection(), column, Omega("rademacher", 0, 0)),
        lambda: sketch.sketch(sketched, x, w, Selection(index, weight), None, Omega("gaussian", 2**40, 3)),
        lambda: sketch.project(sketched, x, Omega("gaussian", 5, 6)),
        lambda: draws.random_matrix(square, "rademacher", 0, 0, 0),
        lambda: linear.linear(torch.zeros_like(x), x, w, t, b),
        lambda: grouped.shrink(t, x, offsets, factor, 1, None),
        lambda: grouped.reduce(sums, t, x, offsets, None),
        lambda: grouped.expand(x, t, offsets, factor, x, None),
        lambda: pro.lora_pro_adam(moments, (right, left, right, left), adam, None, right.clone(), left.clone()),
    )
    with fake_gpu() as launches, mock.patch.object(linear, "capability_of", lambda device: (9, 0)):
        for call in calls:
            launches.clear()
            call()
            first = [kernel for kernel, _, _ in launches]
            launches.clear()
            call()
            assert [kernel for kernel, _, _ in launches] == first
            assert all(type(args[0]) is int for _, _, args in launches), launches.names()
            launched |= {id(kernel.src.fn) for kernel in first}
    modules = (_reduce, covariance, draws, gradients, grouped, linear, pro, sketch)
    assert {op.kernel_module for op in OPS.values()} - {None} <= {module.__name__ for module in (*modules, skinny)}
    for module in modules:
        for name, kernel in vars(module).items():
            if name.endswith("_kernel") and kernel.fn.__module__ == module.__name__:
                assert id(kernel) in launched, f"{name} of {module.__name__} is not launched here"


class Kernels(TorchDispatchMode):
    """Counts the operations of torch that would launch something on a GPU."""

    FREE = ("empty", "new_empty", "t.", "transpose", "view", "detach", "slice", "alias", "as_strided", "select")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        if not name.startswith(self.FREE):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def count(tokens, n, m, factor_dtype, drop, launches):
    """The launches of a layer's forward and backward pass."""
    x, g = (torch.empty(tokens, size, dtype=HALF, device="meta") for size in (n, m))
    weight = torch.empty(m, n, dtype=HALF, device="meta")
    a, b = (torch.empty(*shape, dtype=factor_dtype, device="meta") for shape in ((16, n), (m, 16)))
    seed = torch.zeros(1, dtype=torch.int64, device="meta") if drop else None
    scalars = passes.Scalars(2.0, 0.0, 3000 if drop else 0, 0, "triton")
    launches.clear()
    with Kernels() as kernels:
        _, t = passes.forward(x, weight, None, a, b, None, None, seed, scalars)
        dx, da, db = passes.backward(g, x, t, weight, a, b, None, None, seed, scalars, True)
    assert (dx.dtype, da.dtype, db.dtype) == (HALF, factor_dtype, factor_dtype)
    assert da.is_contiguous() and db.is_contiguous()
    return launches.names() + kernels.names


@contextlib.contextmanager
def chip_of(processors):
    """A chip of so many multiprocessors, for the skinny products."""
    with contextlib.ExitStack() as stack:
        for module in (config, _tiles):
            stack.enter_context(mock.patch.object(module, "processors", lambda device: processors))
        skinny._plan.cache_clear()
        config.shrink_config.cache_clear()
        yield
        skinny._plan.cache_clear()
        config.shrink_config.cache_clear()


def few_launches():
    """At most 8 for a layer, forward and backward, on a chip of 132 multiprocessors."""
    with fake_gpu() as launches, chip_of(132):
        for (tokens, n, m), dtype, drop in itertools.product(
            ((8192, 4096, 4096), (8192, 4096, 14336), (16384, 2048, 512)), (HALF, FLOAT), (False, True)
        ):
            names = count(tokens, n, m, dtype, drop, launches)
            assert len(names) <= 8 and "keep_kernel" not in names, (tokens, n, m, names)
        # Few tokens: the sums of t and of u are cut into parts.
        assert len(count(1024, 4096, 4096, FLOAT, False, launches)) <= 10


def fallbacks():
    """AMD's kernels, versions that nobody has looked at and numbers beyond int32 go through the front end."""
    tensors = (torch.zeros(64, 16, dtype=HALF), *(torch.zeros(64, 64, dtype=HALF) for _ in range(3)))
    numbers = (64, 64, 16, 1, 64, 1.0, 0, 0)
    versions = mock.patch.object(_launching, "KNOWN_TRITON", ())
    platform = mock.patch.object(_launching, "build_platform", lambda: "hip")
    with fake_gpu() as launches:
        for place in (versions, platform):
            constants = Constants(4, 3, **SHRINK)
            _launching.prepares.cache_clear()
            with place:
                for _ in range(2):
                    launch(skinny.shrink_kernel, (1, 1, 1), tensors, numbers, constants)
            _launching.prepares.cache_clear()
            assert not constants.compiled and isinstance(launches[-1][2][0], torch.Tensor)
        other_order = Constants(4, 3, **dict(reversed(SHRINK.items())))
        for _ in range(2):
            launch(skinny.shrink_kernel, (1, 1, 1), tensors, numbers, other_order)
        assert launches[-1][2][-len(SHRINK) :] == tuple(SHRINK.values()) == launches[-2][2][-len(SHRINK) :]


def hooks():
    """Hooks of profilers see prepared launches, too, whether they stand before or after, as a chain or alone."""
    tensors = torch.zeros(64, 16, dtype=HALF), *(torch.zeros(64, 64, dtype=HALF) for _ in range(3))
    numbers, seen = (64, 64, 16, 1, 64, 1.0, 0, 0), []
    chain = getattr(knobs, "HookChain", None)
    with fake_gpu() as launches:
        constants = Constants(4, 3, **SHRINK)

        def run():
            launch(skinny.shrink_kernel, (1, 1, 1), tensors, numbers, constants)

        run()
        with mock.patch.object(knobs.runtime, "launch_enter_hook", seen.append):
            run()
        assert len(seen) == 1 and type(launches[-1][2][0]) is int
        with mock.patch.object(knobs.runtime, "launch_exit_hook", seen.append):
            assert _launching.hooked()
        if chain is not None:
            hooks = chain()
            with mock.patch.object(knobs.runtime, "launch_enter_hook", hooks):
                assert not _launching.hooked()
                hooks.add(seen.append)
                run()
            assert len(seen) == 2
        assert not _launching.hooked()


def no_growth():
    """Batches of ever other lengths share what is compiled, and do not fill the memory."""
    with fake_gpu() as launches, mock.patch.object(_launching, "_MOST_KEPT", 50), contextlib.ExitStack() as stack:
        x, a, out = (torch.zeros(size, 64, dtype=HALF) for size in (500, 16, 500))
        plans, plan = [], skinny._plan
        stack.enter_context(
            mock.patch.object(skinny, "_plan", lambda *a, **b: plans.append(plan(*a, **b)) or plans[-1])
        )
        for tokens in range(1, 400):
            skinny.shrink(out.view(-1)[: tokens * 16].view(tokens, 16), x[:tokens], a, 1.0, None)
            launches.clear()
        assert launches.compiled <= 5
        assert all(len(plan.constants.compiled) <= 50 for plan in plans)


def waits(*_, **__):
    raise AssertionError("the host waits for the device: that cannot be captured in a graph")


def capturable():
    """A warm training step of accelerated layers, dropout included, never waits, compiles nothing, and repeats."""
    model = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)).to(HALF),
        peft.LoraConfig(r=16, target_modules=["0", "1"], lora_dropout=0.1),
    )
    x, steps = torch.randn(32, 64, dtype=HALF), []
    reads = ("item", "tolist", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
    with fake_gpu() as launches, contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(_backend, "triton_refuses", lambda device: None))
        stack.enter_context(mock.patch.object(skinny_op, "triton_refuses", lambda device: None))
        stack.enter_context(use_backend("triton"))
        assert [layer.path for layer in accelerate(model)] == ["fused", "fused"]
        for step in range(4):
            launches.clear()
            launches.compiled = 0
            with contextlib.ExitStack() as guards:
                for name in reads if step else ():
                    guards.enter_context(mock.patch.object(torch.Tensor, name, waits))
                y = model(x)
                y.backward(torch.ones_like(y))
            steps.append([(kernel, grid) for kernel, grid, _ in launches])
            assert len(launches) == 2 * 5 - 1  # no gradient for x
            if step:
                assert launches.compiled == 0
                assert all(type(args[0]) is int for _, _, args in launches), "a launch went through the front end"
        assert steps[1] == steps[2] == steps[3]


def lora_pro():
    """A step of LoRA-Pro has a launch of each kernel (two for sums) per shape, prepared from the second step on."""
    shapes, expected = [(32, 64)] * 3 + [(64, 48)] * 2, ["join_kernel", "adam_kernel", *["sum_slabs_kernel"] * 2] * 2
    for state, drawn in itertools.product((None, HALF), (2.0, None)):
        pairs = [tuple(torch.nn.Parameter(torch.randn(*size)) for size in ((16, n), (m, 16))) for m, n in shapes]
        scaling = drawn or [1.0, 1.0, 2.0, 2.0, 2.0]  # of the first shape, neighbours are one launch
        optimizer = LoraPro([{"pairs": pairs, "scaling": scaling}], lr=1e-3, mode="full", state_dtype=state)
        with fake_gpu() as launches, mock.patch.object(pro_op.adam, "choose", lambda *_: "triton"):
            arguments = []
            for step in range(3):
                for factor in itertools.chain(*pairs):
                    factor.grad = torch.randn_like(factor)
                launches.clear()
                launches.compiled = 0
                built = _tiles.int64_on.cache_info().misses
                optimizer.step()
                assert launches.names() == (expected if drawn else expected[:4] + expected)
                arguments.append([args for kernel, _, args in launches if kernel.src.fn is pro.adam_kernel])
                if step:
                    assert launches.compiled == 0 and _tiles.int64_on.cache_info().misses == built
                    assert all(type(args[0]) is int for _, _, args in launches), "a launch went through the front end"
            # The table and what the step is not made of stay; one over the bias of the first moment does not.
            for one, other in zip(*arguments[1:], strict=True):
                assert one[0] == other[0] and one[6:17] == other[6:17] and (one[20], other[20]) == (2, 3)
                assert abs(one[17] - 1 / (1 - 0.9**2)) < 1e-12 and abs(other[17] - 1 / (1 - 0.9**3)) < 1e-12
            before = optimizer.state[pairs[0][1]]["exp_avg"]
            optimizer.state[pairs[0][1]]["exp_avg"] = before.clone()  # lies elsewhere: a new table
            launches.clear()
            optimizer.step()
            assert _tiles.int64_on.cache_info().misses == built + 1
            moved = next(args for kernel, _, args in launches if kernel.src.fn is pro.adam_kernel)
            assert (moved[0] if type(moved[0]) is int else moved[0].data_ptr()) != arguments[2][0][0]


if __name__ == "__main__":
    parts = (same_kernels_as_the_front_end, same_arguments, other_kernels, few_launches)
    for part in (*parts, fallbacks, hooks, no_growth, capturable, lora_pro):
        part()
