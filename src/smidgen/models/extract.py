"""A LoRA adapter from the difference of two models of one shape: layer by layer, from their files.

Of the weights no more than one layer's is in memory, beside the adapter itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from smidgen.adapters.attach import adapters_of
from smidgen.adapters.config import whole_number
from smidgen.adapters.layers import LinearLayer, layer_of
from smidgen.adapters.methods.lora import LoraConfig
from smidgen.adapters.nearest import Nearest, kept_lines, nearest
from smidgen.adapters.targets import names_of
from smidgen.errors import ModelError, UsageError, raise_all
from smidgen.models.folder import check_model_folder, weight_files
from smidgen.models.load import quiet
from smidgen.models.peft_model import get_peft_model
from smidgen.models.save import check_empty
from smidgen.models.shapes import model_of


class Stored:
    """A model's folder: its structure without memory, and its tensors read one by one."""

    def __init__(self, folder: Path):
        check_model_folder(folder)
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            raise ModelError(f"{folder}: its weights are stored in few bits; extract from the model in 16 or 32 bits")
        self.folder = folder
        with torch.device("meta"):
            self.model = model_of(config, torch.float32)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
        self._files: dict[str, Path] = {}
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)

    def lacking(self) -> list[str]:
        """A line where parameters of the model are not in the files under their own names."""
        names = [name for name in self.shapes if name not in self._files]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return [f"{self.folder}: not in its files by name: {', '.join(names[:3])}{more}"] if names else []

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored: a view of the file, whose pages are read when they are used."""
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)


def extract_lora(
    base: Path, tuned: Path, folder: Path, rank: int, say: Callable[[str], None] = print
) -> dict[str, Nearest]:
    """Write the LoRA adapter of `rank` that leads nearest from `base` to `tuned`; answer what it keeps, by path.

    Linear layers that are equal get none. What else differs (embeddings, norms, biases) an adapter of this kind cannot
    hold: `say` gets its count and its largest change.

    Raises:
        UsageError: the folder is not empty, the rank is none, or no linear layer differs.
        ModelError: a model cannot be read, the two are of different shape, or hold values that are not finite.
    """
    check_empty(folder)
    raise_all(UsageError, whole_number("rank", rank))
    with quiet():
        before, after = Stored(base), Stored(tuned)
    raise_all(ModelError, _misfits(before, after) or [*before.lacking(), *after.lacking()])
    found, rest = _differences(before, after, rank)
    if rest:
        largest, name = max(rest)
        say(f"not extracted: {len(rest)} tensors outside linear layers differ too, {name} most, by {largest:.2g}")
    if not found:
        raise UsageError(f"{tuned}: no linear layer differs from {base}: there is nothing to extract")
    for line in kept_lines(found, rank):
        say(line)
    model = before.model
    # For the fingerprint of the base, which looks at a few numbers of each tensor.
    model.load_state_dict({name: before.read(name) for name in before.shapes}, strict=False, assign=True)
    model.tie_weights()
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names_of(model, list(found)), task_type="CAUSAL_LM")
    config.ensure_weight_tying = False  # a layer whose weight is tied is no linear layer of its own here
    adapted = get_peft_model(model, config)
    for path, adapter in adapters_of(adapted, "default"):
        adapter.set_factors(found[path].a, found[path].b)  # pyright: ignore[reportCallIssue]
    adapted.save_pretrained(folder)
    return found


def _misfits(before: Stored, after: Stored) -> list[str]:
    """A line for each parameter that only one of the models has, or that has another shape."""
    return [
        f"{name}: {before.shapes.get(name, 'absent')} in {before.folder}, {after.shapes.get(name, 'absent')} in "
        f"{after.folder}"
        for name in before.shapes | after.shapes
        if before.shapes.get(name) != after.shapes.get(name)
    ]


@torch.no_grad()
def _differences(before: Stored, after: Stored, rank: int) -> tuple[dict[str, Nearest], list[tuple[float, str]]]:
    """The updates of linear layers by path, and the largest change and the name of whatever else differs."""
    found: dict[str, Nearest] = {}
    rest: list[tuple[float, str]] = []
    for name in before.shapes:
        path, _, leaf = name.rpartition(".")
        layer = layer_of(before.model.get_submodule(path))
        change = after.read(name).float() - before.read(name).float()
        if not torch.isfinite(change).all():
            raise ModelError(f"{name}: holds values that are not finite, in {before.folder} or {after.folder}")
        if not change.any():
            continue
        if leaf == "weight" and isinstance(layer, LinearLayer):
            found[path] = nearest(layer.matrix(change), rank)
        else:
            rest.append((change.abs().max().item(), name))
    return found, rest
