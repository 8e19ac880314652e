"""An op is one object: what it writes, its backends, and a call that shows its accuracy; CONTRIBUTING.md adds one.

Outputs are allocated by the public function, which checks arguments; only the passes of layers return results.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import itertools
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from lora_kernels._checks import check_written
from lora_kernels.ops import _backend
from lora_kernels.ops._autocast import autocasts
from lora_kernels.ops._backend import Backend, cpp_refuses, triton_refuses

OPS: dict[str, Op] = {}
# The arguments of a small call, and the relative error of what it returned (and wrote) against float64.
Example = tuple[dict[str, Any], Callable[[Any], float]]
_TENSORS = (torch.Tensor, torch.Tensor | None)
_NOTHING = contextlib.nullcontext()


# Asked at every call of a layer.
_compiling, _is_zeros = torch.compiler.is_compiling, torch._is_zerotensor
_modes, _transforms, _tracing = (
    torch._C._len_torch_dispatch_stack, torch._C._are_functorch_transforms_active, torch._C._is_tracing,
)  # fmt: skip
PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether memory can be worked on directly: ordinary tensors, and no compiler, mode or transform around."""
    if _compiling() or _modes() or _transforms() or _tracing():
        return False
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in PLAIN or tensor.is_meta or tensor.is_neg() or _is_zeros(tensor)):
            return False
    return True


def isolated(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What a body runs in: on a device, without autocast, and without modes that change where tensors are created."""
    casts = autocasts(device.type)
    modes = torch._C._len_torch_function_stack() > 0  # torch.set_default_device, for one
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    if not (elsewhere or casts or modes):
        return _NOTHING
    stack = contextlib.ExitStack()
    if elsewhere:
        stack.enter_context(torch.cuda.device(device))
    if casts:
        stack.enter_context(torch.autocast(device.type, enabled=False))
    if modes:
        stack.enter_context(torch._C.DisableTorchFunction())
    return stack


def _first(args: Iterable[Any]) -> torch.Tensor:
    return next(value for value in args if isinstance(value, torch.Tensor))


def device_of(args: Iterable[Any]) -> torch.device:
    """The device of the first tensor among an op's arguments."""
    return _first(args).device


def no_float64(*args: Any) -> str | None:
    """The answer of a backend that takes no float64."""
    return "takes no float64" if _first(args).dtype == torch.float64 else None


def _anything(*_: Any) -> str | None:
    return None


def on_triton(provider: str, takes: Callable[..., str | None] = _anything) -> Backend:
    """A Triton backend; in the interpreter on CPU tensors only on request."""
    return Backend(
        "triton",
        lambda *args: triton_refuses(device_of(args)) or takes(*args),
        lambda *args: device_of(args).type == "cpu",
        provider,
    )


def on_cpp(provider: str | Callable[..., Any], takes: Callable[..., str | None] = _anything) -> Backend:
    """A backend of the compiled extension, on CPU tensors."""
    return Backend("cpp", lambda *args: cpp_refuses(device_of(args)) or takes(*args), provider=provider)


def on_torch(provider: str | Callable[..., Any]) -> Backend:
    """The backend that takes everything."""
    return Backend("torch", _anything, provider=provider)


def with_parts(kernel: str, function: Callable[..., Any]) -> tuple[Backend, ...]:
    """Triton's `kernel`, and a function that goes by parts, which the extension converts and weighs with `cpp`."""
    by_cpp = on_cpp(functools.partial(function, cpp=True), no_float64)
    return on_triton(kernel, no_float64), by_cpp, on_torch(function)


def _register(
    name: str,
    function: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    writes: Sequence[str] = (),
    result: Any = None,
    fake: Callable[..., Any] | None = None,
) -> torch._ops.OpOverload:
    """A function of arguments of these types as an operation of torch; `fake` makes what it returns, empty."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, annotation=hint) for name, hint in arguments.items()]
    function.__signature__ = inspect.Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]
    operation = torch.library.custom_op(f"lora_kernels::{name}", function, mutates_args=writes)
    if fake is not None:
        operation.register_fake(fake)
    return operation._opoverload


def pass_operation(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """A layer's pass as an operation of torch, for tracing: a NamedTuple by its fields, an empty tensor for `None`."""
    hints = typing.get_type_hints(function)
    arguments: dict[str, Any] = {}
    parameters = inspect.signature(function).parameters.values()
    kinds = [hints[parameter.name] for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]
    for parameter, hint in zip(parameters, kinds, strict=False):
        arguments |= typing.get_type_hints(hint) if hasattr(hint, "_fields") else {parameter.name: hint}

    def registered(*args: Any) -> tuple[torch.Tensor, ...]:
        values = iter(args)
        packed = [
            kind(*itertools.islice(values, len(kind._fields))) if hasattr(kind, "_fields") else next(values)
            for kind in kinds
        ]
        with isolated(device_of(args)):
            results = function(*packed)
        return tuple(args[0].new_empty(0) if result is None else result for result in results)

    returned = (torch.Tensor,) * len(typing.get_args(hints["return"]))
    return _register(name, registered, arguments, result=types.GenericAlias(tuple, returned), fake=fake)


class Op:
    """One operation on all backends."""

    example: Callable[[torch.device], Example]  # keyword arguments of the public function, and the error of its result
    bound: float  # of that error, on every backend and processor

    def __init__(
        self,
        name: str,
        body: Callable[..., Any] | torch._ops.OpOverload,
        *,
        writes: Sequence[str] = (),
        backends: Sequence[Backend],
        accumulates: bool = False,
    ) -> None:
        """Register an op under the name of its public function in `lora_kernels.ops`, its backends best first.

        `body` is called with a backend, which it calls in turn (or asks for its name), and the op's arguments; or it is
        an operation that is registered, and run by others. What an op `accumulates` into is the caller's, and checked
        to lie apart from what is read.
        """
        self.name, self.writes, self.backends = name, tuple(writes), tuple(backends)
        OPS[name] = self
        if isinstance(body, torch._ops.OpOverload):
            self.overload = body
            return
        first, *parameters = inspect.signature(body).parameters.values()
        hints = typing.get_type_hints(body)
        arguments = {parameter.name: hints[parameter.name] for parameter in parameters}
        self._body, self._accumulates, self._names = body, accumulates, list(arguments)
        self._by_name = {backend.name: backend for backend in backends}
        self._tensors = [i for i, kind in enumerate(arguments.values()) if kind in _TENSORS]
        self._written = [self._names.index(written) for written in writes]
        self._read = [i for i in self._tensors if i not in self._written]

        def registered(*args: Any) -> None:
            self._execute(args[-1], args[:-1])

        # Takes the body's arguments, and last the name of a backend.
        self.overload = _register(name, registered, {**arguments, first.name: str}, writes=writes)

    def __call__(self, backend: str, *args: Any) -> None:
        """Choose the backend and run on arguments that are checked; see `choose` for errors."""
        if self._accumulates:
            others = {self._names[i]: args[i] for i in self._tensors}
            for i in self._written:
                del others[self._names[i]]
                if args[i] is not None:
                    check_written(self._names[i], args[i], **others)
        self.run(self.choose(backend, *args), *args)

    def run(self, backend: str, *args: Any) -> None:
        """Run on a backend that takes the checked arguments, past torch's dispatcher where only it would see."""
        values = list(args)
        if is_plain(*[args[i] for i in self._tensors]):
            for i in self._read:
                if args[i] is not None and args[i].requires_grad:
                    values[i] = args[i].detach()
            self._execute(backend, values)
            # Kernels write memory behind autograd's back: a graph that kept the old numbers must hear of it.
            torch.autograd.graph.increment_version([args[i] for i in self._written if args[i] is not None])
            return
        for i in self._read:
            values[i] = None if args[i] is None else args[i].detach()
        self.overload(*values, backend)

    def choose(self, backend: str, *args: Any) -> str:
        """The name of the backend that runs a call; see `_backend.choose`."""
        return _backend.choose(self.name, self.backends, backend, args).name

    def explain(self, *args: Any) -> dict[str, str | None]:
        """Per backend, why it cannot take these arguments (`None`: it can)."""
        return {backend.name: backend.refuses(*args) for backend in self.backends}

    def self_test(self, terms: int, dtype: torch.dtype = torch.float32) -> Callable[[Any], Any]:
        """Decorates the function that makes the example; its result may be wrong by `terms` roundings of dtype."""

        def keep(example: Callable[[torch.device], Example]) -> Callable[[torch.device], Example]:
            self.example, self.bound = example, terms * torch.finfo(dtype).eps
            return example

        return keep

    @property
    def kernel_module(self) -> str | None:
        """The module of its Triton kernels, or `None`."""
        providers = (backend.provider for backend in self.backends if backend.name == "triton")
        return next((f"lora_kernels.ops.{str(provider).partition(':')[0]}" for provider in providers), None)

    @property
    def function(self) -> Callable[..., Any]:
        """The public function."""
        function: Callable[..., Any] = getattr(importlib.import_module("lora_kernels.ops"), self.name)
        return function

    def error(self, device: torch.device, backend: str) -> float:
        """The error of the example on a device and a backend; see `choose` for errors."""
        arguments, error = self.example(device)
        return error(self.function(**arguments, backend=backend))

    def _execute(self, backend: str, args: Sequence[Any]) -> None:
        with isolated(device_of(args)):
            self._body(self._by_name[backend], *args)


def relative_error(results: Sequence[torch.Tensor], truths: Sequence[torch.Tensor]) -> float:
    """The largest Frobenius error of results relative to their truths in float64."""
    errors = []
    for result, truth in zip(results, truths, strict=True):
        exact = truth.detach().double()
        errors.append(float(torch.dist(result.detach().double(), exact) / torch.linalg.norm(exact)))
    return max(errors)


def normal(device: torch.device, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The same normal numbers on every device, for self-tests."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]
