"""An op is one object: what it writes and checks, its backends, and a call that shows its accuracy.

Outputs are allocated by the public function and the op returns nothing, unless it says what it returns. Adding an op is
adding a folder whose `op.py` makes an `Op`: it registers the operation with torch, chooses the backend, and enters
`OPS`, which all lists of ops read.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
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


def device_of(args: Iterable[Any]) -> torch.device:
    """The device of the first tensor among arguments."""
    for value in args:
        if isinstance(value, torch.Tensor):
            return value.device
    raise TypeError("an op needs at least one tensor")


def no_float64(*args: Any) -> str | None:
    """The answer of a backend that takes no float64, by the first tensor among an op's arguments."""
    first = next(value for value in args if isinstance(value, torch.Tensor))
    return "takes no float64" if first.dtype == torch.float64 else None


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


class Op:
    """One operation on all backends."""

    example: Callable[[torch.device], Example]  # keyword arguments of the public function, and the error of its result
    bound: float  # of that error, on every backend and processor

    def __init__(
        self,
        name: str,
        body: Callable[..., Any],
        *,
        writes: Sequence[str] = (),
        backends: Sequence[Backend],
        check: Callable[..., None] | None = None,
        fake: Callable[..., Any] | None = None,
        listed: bool = True,
    ) -> None:
        """Register an op under the name of its public function in `lora_kernels.ops`, its backends best first.

        `body` is called with a backend, which it calls in turn (or asks for its name), and the op's arguments: tensors,
        optional ones (of which some are written), ints, floats, bools and strings. `check` is called with arguments
        that come from the user as they are; what is written is then checked to lie apart from what is read. `fake`, of
        an op that returns tensors, makes empty ones. An op that is a part of another is not `listed` in `OPS`.
        """
        first, *parameters = inspect.signature(body).parameters.values()
        hints = typing.get_type_hints(body)
        parameters = [parameter.replace(annotation=hints[parameter.name]) for parameter in parameters]
        self.name, self.writes, self.backends = name, tuple(writes), tuple(backends)
        self._body, self._check = body, check
        self._by_name = {backend.name: backend for backend in backends}
        self._names = [parameter.name for parameter in parameters]
        self._tensors = [i for i, parameter in enumerate(parameters) if parameter.annotation in _TENSORS]
        self._written = [self._names.index(written) for written in writes]
        self._read = [i for i in self._tensors if i not in self._written]

        def registered(*args: Any) -> Any:
            return self._execute(args[-1], args[:-1])

        parameters.append(first.replace(annotation=str))
        returned = hints["return"] if fake is not None else None
        signature = inspect.Signature(parameters, return_annotation=returned)
        registered.__signature__ = signature  # type: ignore[attr-defined]
        operation = torch.library.custom_op(f"lora_kernels::{name}", registered, mutates_args=writes)
        if fake is not None:
            operation.register_fake(fake)
        self.overload = operation._opoverload  # takes the body's arguments, and last the name of a backend
        if listed:
            OPS[name] = self

    def __call__(self, backend: str, *args: Any) -> None:
        """Check arguments, choose the backend and run; see `choose` for errors."""
        if self._check is not None:
            self._check(*args)
            self._check_written(args)
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

    def _execute(self, backend: str, args: Sequence[Any]) -> Any:
        with isolated(device_of(args)):
            return self._body(self._by_name[backend], *args)

    def _check_written(self, args: Sequence[Any]) -> None:
        others = {self._names[i]: args[i] for i in self._tensors}
        for i in self._written:
            del others[self._names[i]]
            if args[i] is not None:
                check_written(self._names[i], args[i], **others)


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
