"""Reading batches with a limit and a digest of those read, and calling a model with them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: a mapping as keywords, a tuple or list as positions, anything else as one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def without_peft(model: nn.Module) -> nn.Module:
    """The model inside a PEFT model; any other model unchanged."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, no-any-return]


def trimmer(model: nn.Module, observed: Sequence[nn.Module]) -> Callable[[Any], Any]:
    """A function that reduces a batch to what observed modules need, if the model's output is not used."""
    # For transformers models with `logits_to_keep` it drops the labels and asks for one row of logits.
    inner: Any = without_peft(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if (
        not isinstance(head, nn.Module)
        or {id(module) for module in head.modules()} & {id(module) for module in observed}
        or "logits_to_keep" not in inspect.signature(inner.forward).parameters
    ):
        return lambda batch: batch

    def trim(batch: Any) -> Any:
        if not isinstance(batch, Mapping) or "logits_to_keep" in batch:
            return batch
        return {**{key: value for key, value in batch.items() if key != "labels"}, "logits_to_keep": 1}

    return trim


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a (nested) batch; other values are unchanged."""
    if isinstance(batch, torch.Tensor):
        return batch.detach().to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [to_device(value, device) for value in batch]
    return batch


def model_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter (the CPU without any); a ValueError if all are on the meta device."""
    devices = [parameter.device for parameter in model.parameters() if parameter.device.type != "meta"]
    if devices:
        return devices[0]
    if any(True for _ in model.parameters()):
        raise ValueError("model is on the meta device: load its weights before collecting statistics")
    return torch.device("cpu")


def _feed_digest(batch: Any, digest: Any) -> None:
    if isinstance(batch, torch.Tensor):
        digest.update(repr((tuple(batch.shape), str(batch.dtype))).encode())
        if batch.numel():
            digest.update(batch.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(batch, Mapping):
        for key in sorted(batch, key=str):
            digest.update(str(key).encode())
            _feed_digest(batch[key], digest)
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            _feed_digest(value, digest)
    else:
        digest.update(repr(batch).encode())


class Feed:
    """The batches of one pass, without those that an interrupted run has read."""

    def __init__(
        self, loader: Iterable[Any], limit: int | None, *, skip: int = 0, expected: str = "", digests: bool = False
    ) -> None:
        """Read at most `limit` batches, skipping the first `skip`, whose digest must be the expected one."""
        self.loader, self.limit, self.skip, self.expected, self.digests = loader, limit, skip, expected, digests
        self.done = 0  # number of batches read, with those skipped
        self.digest = ""  # of these batches, if `digests`
        self.stopped = False  # whether to stop after the current batch

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches to process; a ValueError if the first ones are not those of the interrupted run."""
        if self.limit is not None and self.skip >= self.limit:
            self.done, self.digest = self.skip, self.expected
            return
        for batch in self.loader:
            self.done += 1
            if self.digests:
                digest = hashlib.blake2b(self.digest.encode(), digest_size=16)
                _feed_digest(batch, digest)
                self.digest = digest.hexdigest()
            if self.done < self.skip:
                continue
            if self.done == self.skip:
                if self.digest != self.expected:
                    raise ValueError(
                        f"the checkpoint was written after {self.skip} other batches than the loader now yields: "
                        "the data or its order has changed (a shuffling loader?); delete the checkpoint to start anew"
                    )
                continue
            yield batch
            if self.stopped or self.done == self.limit:
                return
        if self.done < self.skip:
            raise ValueError(f"the checkpoint was written after {self.skip} batches, but the loader has {self.done}")
