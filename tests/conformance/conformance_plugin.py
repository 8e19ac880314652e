"""A plugin of pytest: PEFT's tests, offline, and on accelerated layers if `CONFORMANCE_MODE` is `fused`.

It writes what came of each test, and how many layers ran accelerated in it, to `CONFORMANCE_RECORD`.
"""

import inspect
import json
import os
import warnings
from pathlib import Path

import huggingface_hub
import peft
import pytest
import selection
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner

import lora_kernels as lk

FUSED = os.environ["CONFORMANCE_MODE"] == "fused"
RECORD = Path(os.environ["CONFORMANCE_RECORD"])
results: dict[str, dict] = {}
seen = {"layers": 0, "accelerated": 0}  # of the test that runs


def accelerate(model) -> None:
    """Accelerate the LoRA layers of a model, if it has any."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        return
    seen["layers"] += len(layers)
    if not FUSED:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tests count PEFT's
        lk.accelerate(model, guard=False)
    seen["accelerated"] += sum(not type(layer).__module__.startswith("peft.") for layer in layers)


def _accelerating(inject):
    def inject_adapter(self, model, *args, **kwargs):
        result = inject(self, model, *args, **kwargs)
        accelerate(model)
        return result

    return inject_adapter


# All ways to LoRA layers lead through here: get_peft_model, from_pretrained, add_adapter, load_adapter,
# inject_adapter_in_model, mixed models, transformers' and diffusers' own.
BaseTuner.inject_adapter = _accelerating(BaseTuner.inject_adapter)


def _in_cache(repo_id, filename, **kwargs):
    """In place of a question to the hub that no cache answers."""
    return isinstance(huggingface_hub.try_to_load_from_cache(repo_id, filename), str)


peft.utils.other.file_exists = _in_cache


class _Offline(dict):
    """Every model counts as one that was fetched before."""

    def __contains__(self, key):
        return True

    def __missing__(self, key):
        return 0


def pytest_collection_modifyitems(config, items):
    others = [item for item in items if selection.other_method(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in set(others)]
    for module in {item.module for item in items}:
        utilities = getattr(module, "hub_online_once", None)
        if utilities is not None:
            inspect.unwrap(utilities).__globals__["_HUB_MODEL_ACCESSES"] = _Offline()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    seen.update(layers=0, accelerated=0)
    yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    if call.when == "call":
        outcome.get_result().user_properties.append(("seen", dict(seen)))


def pytest_runtest_logreport(report):
    """Keep the worst of a test's phases; a test that is meant to fail and does has passed."""
    known = results.setdefault(report.nodeid, {"outcome": "passed", "message": "", "layers": 0, "accelerated": 0})
    known.update(dict(report.user_properties).get("seen", {}))
    if report.outcome == "passed":
        return
    if report.skipped and hasattr(report, "wasxfail"):
        known["outcome"] = "xfailed"
        return
    known["outcome"] = report.outcome
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    lines = [line for line in text.splitlines() if line.startswith("E ")] or text.splitlines()[-1:]
    known["message"] = "\n".join(lines)[:600]


def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):
        RECORD.write_text(json.dumps(results, indent=1, sort_keys=True))
