"""Converting an adapter for good: to LoRA, with the change of its answers told, or to files of others, without loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from smidgen.adapters.config import PeftConfig
from smidgen.adapters.expert_layouts import fuse_experts, split_experts
from smidgen.adapters.files import read_adapter, save_adapter
from smidgen.adapters.methods.lora import LoraConfig
from smidgen.adapters.mlx import from_mlx, to_mlx
from smidgen.errors import UsageError
from smidgen.export.merge import Parity, Probe
from smidgen.models.conversion import save_as_lora
from smidgen.models.open import find
from smidgen.models.resolve import resolve_model
from smidgen.models.save import check_empty
from smidgen.models.shapes import describe_model, model_of

FORMATS = ("mlx", "peft", "per-expert", "stacked")


def convert_to_folder(
    model: Any, tokenizer: Any, folder: Path, rank: int, say: Callable[[str], None] = print
) -> Parity:
    """Write the nearest LoRA adapter to the one that answers, load it again, and tell how its answers differ.

    Raises:
        UsageError: the folder is not empty, or the adapter updates no weights.
        MergeError: the adapter cannot be merged.
    """
    name = model.active_adapter
    probe = Probe(model, tokenizer)
    save_as_lora(folder, model, rank, name, say)
    tokenizer.save_pretrained(folder)
    model.delete_adapter(name)
    model.load_adapter(folder, name)
    model.set_adapter(name, inference_mode=True)
    parity = probe.compare(model, math.inf)
    say(str(parity))
    return parity


def convert_files(run: Path, folder: Path, to: str, base: str | None = None) -> None:
    """Write the adapter of a run or adapter folder in another format of files; numbers stay as they are.

    Args:
        to: one of `FORMATS`: for mlx-lm, from mlx-lm, or the experts of a mixture each by itself or in stacks.
        base: the base model, whose configuration alone is read, where the adapter does not say.

    Raises:
        UsageError: the folder is not empty, the format is unknown, or it cannot hold the adapter.
        AdapterFileError: there is no such adapter.
    """
    check_empty(folder)
    if to not in FORMATS:
        raise UsageError(f"--to: must be lora, {', '.join(FORMATS)}, got '{to}'")
    place = run / "adapter" if (run / "recipe.yaml").is_file() else run
    if to in ("mlx", "peft"):
        (to_mlx if to == "mlx" else from_mlx)(place, folder)
        return
    config, (tensors, metadata) = PeftConfig.from_pretrained(place), read_adapter(place)
    if not isinstance(config, LoraConfig):
        raise UsageError(f"{place}: experts have LoRA only, this is {config.peft_type.lower()}")
    described = describe_model(resolve_model(find(run, base).base, weights=False))
    with torch.device("meta"):
        model = model_of(described.config, torch.float32)
    change = fuse_experts if to == "stacked" else split_experts
    save_adapter(folder, change(model, config, tensors, str(place)), config, metadata)
