"""From any adapter that is a function of weights to LoRA, which every tool reads. The names are peft's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from smidgen.adapters import attach
from smidgen.adapters.convert import attach_as_lora
from smidgen.adapters.files import adapter_state_dict
from smidgen.adapters.methods.lora import LoraConfig
from smidgen.adapters.nearest import kept_lines
from smidgen.errors import UsageError
from smidgen.models.peft_model import AdaptedModel
from smidgen.models.save import check_empty


def convert_to_lora(
    model: Any, rank: int, adapter_name: str = "default", say: Callable[[str], None] = print
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The nearest LoRA adapter of `rank`: its configuration, and its tensors under the keys of an adapter file.

    The model stays as it is.

    Args:
        say: gets a line for each kind of layer: how much of the updates is kept, and the relative error.

    Raises:
        UsageError: there is no such adapter, or it updates no weights.
        MergeError: it cannot be merged.
    """
    with _as_lora(model, rank, adapter_name, say) as name:
        return model.peft_config[name], adapter_state_dict(model, name)


def save_as_lora(
    path: str | Path, model: Any, rank: int, adapter_name: str = "default", say: Callable[[str], None] = print
) -> None:
    """As `convert_to_lora`, written into the folder `path` as an adapter.

    Raises:
        UsageError, MergeError: as there, or the folder is not empty.
    """
    check_empty(Path(path))
    with _as_lora(model, rank, adapter_name, say) as name:
        model._save_one(name, Path(path))


@contextmanager
def _as_lora(model: Any, rank: int, adapter_name: str, say: Callable[[str], None]) -> Iterator[str]:
    """The name of a LoRA adapter that is on the model inside the block."""
    if not isinstance(model, AdaptedModel):
        raise UsageError(f"a {type(model).__name__} without adapters has none to convert")
    model._check_names([adapter_name])
    state, name = model._adapters, f"{adapter_name}_as_lora"
    found = attach_as_lora(model, state, adapter_name, name, rank)
    try:
        for line in kept_lines(found, rank):
            say(line)
        yield name
    finally:
        attach.detach(model, state, name)
