"""What may come of a call: a documented error that this package raised, in words; or the right answer."""

import contextlib
import faulthandler
import inspect
import os
import re
import traceback
import warnings
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis.vendor import pretty

import lora_kernels

PACKAGE = Path(lora_kernels.__file__).parent
LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
TRACE = os.environ.get("FUZZ_TRACE")  # a file: the call under way, to be read after a crash of the interpreter


def examples(count):
    """Hypothesis' settings: the same few examples every time, or many new ones (HYPOTHESIS_PROFILE=long)."""
    factor = int(os.environ.get("FUZZ_FACTOR", "40")) if LONG else 1
    return settings(
        max_examples=count * factor,
        derandomize=not LONG,
        deadline=None,
        database=None,
        print_blob=LONG,
        suppress_health_check=list(HealthCheck),
    )


def documented(function):
    """The errors in the `Raises` section of a docstring, by name."""
    text = inspect.getdoc(function) or ""
    if inspect.isclass(function):  # a class and its constructor share one list
        text += "\n\n" + (inspect.getdoc(function.__init__) or "")
        text += "\n\n" + (inspect.getdoc(getattr(function, "__post_init__", None)) or "")
    found = set()
    for section in re.findall(r"^ *Raises:\n((?:[ \t]+.*\n?|\n)+)", text, re.MULTILINE):
        found |= set(re.findall(r"^ {4,12}(\w+(?:Error|Exception)):", section, re.MULTILINE))
    return found


def _show(value):
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_nested:
        return f"{type(value).__name__}{tuple(value.shape)} {value.dtype} {value.device} {value.stride()}"
    with contextlib.suppress(Exception):
        return repr(value)[:200]
    return type(value).__name__


# What hypothesis prints of an example: a tensor without memory must not be read.
pretty.for_type_by_name("torch", "Tensor", lambda value, printer, _cycle: printer.text(_show(value)))


def describe(arguments):
    return ", ".join(f"{name}={_show(value)}" for name, value in arguments.items())


# Torch says by itself that memory does not suffice.
MEMORY = re.compile("can't allocate memory|Storage size calculation overflowed|integer multiplication overflow")


def _ours(error):
    """Whether a `raise` of this package made the error, not what happened to fail (memory apart)."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    return PACKAGE in Path(last.filename).parents and (last.line or "").lstrip().startswith("raise")


def outcome(function, arguments, *, documentation=None):
    """Call, and judge the error if there is one.

    Returns:
        Whether the call succeeded, and its result.
    """
    allowed = documented(documentation or function)
    name = getattr(function, "__qualname__", str(function))
    if TRACE:
        Path(TRACE).write_text(f"{name}({describe(arguments)})\n")
        faulthandler.dump_traceback_later(120, exit=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return True, function(**arguments)
    except Exception as error:
        if isinstance(error, RuntimeError) and MEMORY.search(str(error)):
            return False, error
        kinds = {each.__name__ for each in type(error).__mro__}
        what = f"{name}({describe(arguments)})\n{type(error).__name__}: {error}"
        if not kinds & allowed:
            raise AssertionError(f"undocumented error (documented: {sorted(allowed)}) of {what}") from error
        if not _ours(error):
            raise AssertionError(f"an error that happened instead of one that was raised: {what}") from error
        if not str(error).strip():
            raise AssertionError(f"an error without a word: {what}") from error
        return False, error
    finally:
        if TRACE:
            faulthandler.cancel_dump_traceback_later()


def close(found, truth, scale, rounding=0.0, what="result"):
    """Compare with float64 where that is in the range of the dtype; what cannot be finite must not be."""
    assert tuple(found.shape) == tuple(truth.shape), f"{what} has shape {tuple(found.shape)}, not {tuple(truth.shape)}"
    limits = torch.finfo(found.dtype)
    rounding = rounding or 64 * max(limits.eps, torch.finfo(torch.float32).eps if found.dtype != torch.float64 else 0)
    found, truth, scale = (each.detach().to(torch.float64) for each in (found, truth, scale))
    sure = torch.isfinite(truth) & (scale < limits.max / 8)
    wrong = sure & ~((found - truth).abs() <= rounding * scale + 64 * limits.tiny)
    assert not bool(wrong.any()), (
        f"{what} is {found[wrong][:3].tolist()}, should be {truth[wrong][:3].tolist()}, "
        f"at {wrong.nonzero()[:3].tolist()}"
    )
    hidden = torch.isnan(truth) & torch.isfinite(found)
    assert not bool(hidden.any()), f"{what} is finite at {hidden.nonzero()[:3].tolist()}, where the truth is NaN"
