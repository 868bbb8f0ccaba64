"""Files of adapters over a base that answers without a part which only data could tell again.

Other tools have no place for that part, s B0 A0, but a LoRA of twice the rank says the same: A' = [A; A0] and
B' = [B, -B0]. So it is written, and what it stands for beside it, so that it is taken apart again here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from smidgen.adapters.init.config import TAKING, StartConfig
from smidgen.errors import AdapterFileError

# The factors in files, and the dimension that is the rank.
_FACTORS = {"lora_A.weight": 0, "lora_embedding_A": 0, "lora_B.weight": 1, "lora_embedding_B": 1}
_FIELDS = ("init_lora_weights", "r", "lora_alpha", "rank_pattern", "alpha_pattern")


def as_plain(config: Any, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    """Configuration and tensors of a file that every tool reads alike, and the marks to take them apart again."""
    if not isinstance(config, StartConfig) or config.init_lora_weights not in (*TAKING, "loftq"):
        return config, tensors, {}
    written: Any = copy.copy(config)
    written.init_lora_weights = True  # other tools would compute the start again
    if config.init_lora_weights not in TAKING:
        return written, tensors, {}
    growth = 2**0.5 if written.use_rslora else 2
    written.r, written.lora_alpha = 2 * written.r, growth * written.lora_alpha
    written.rank_pattern = {path: 2 * r for path, r in written.rank_pattern.items()}
    written.alpha_pattern = {path: growth * alpha for path, alpha in written.alpha_pattern.items()}
    plain = {}
    for key, tensor in tensors.items():
        factor = _factor(key)
        if factor is not None:
            start = tensors.get(_start_key(key, factor), torch.zeros_like(tensor))
            tensor = torch.cat([tensor, -start if _FACTORS[factor] else start], _FACTORS[factor])
        if not key.endswith((".start_A", ".start_B")):
            plain[key] = tensor
    return written, plain, {"start": {name: getattr(config, name) for name in _FIELDS}}


def changes_base(config: Any) -> bool:
    """Whether the start stored the base's weights anew, so that the adapter fits no other."""
    options = getattr(config, "loftq_config", None)
    return options is not None and options.loftq_iter > 1


def fields_of(metadata: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The fields of the configuration before it was made plain; none for files that are what they say.

    Raises:
        AdapterFileError: the marks are not those that `as_plain` leaves.
    """
    start = metadata.get("start", {})
    if not isinstance(start, dict) or (start and (start.keys() != {*_FIELDS} or start[_FIELDS[0]] not in TAKING)):
        raise AdapterFileError(f"{place}: metadata of smidgen: 'start' must hold {', '.join(_FIELDS)}")
    return start


def check_told(config: Any, metadata: Mapping[str, Any], place: str) -> None:
    """Refuse a file that does not say what its start took from the base.

    Raises:
        AdapterFileError: it is such a file, written by another tool.
    """
    name = getattr(config, "init_lora_weights", None)
    if name in TAKING and "start" not in metadata:
        raise AdapterFileError(
            f"{place}: '{name}' took a part of the base's weights, and the file does not say which. Save the adapter "
            "in peft with path_initial_model_for_weight_conversion; or, where the base was saved too, load that one "
            "and write init_lora_weights: true into adapter_config.json"
        )


def taken_apart(tensors: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as the adapter has them, `wanted` by key, of those that `as_plain` made."""
    taking = any(key.endswith(".start_A") and key not in tensors for key in wanted)
    if not taking:
        return tensors
    apart = {}
    for key, tensor in tensors.items():
        factor = _factor(key)
        dim = 0 if factor is None else _FACTORS[factor]
        if factor is None or tensor.dim() <= dim or tensor.shape[dim] % 2:
            apart[key] = tensor
            continue
        apart[key], start = tensor.chunk(2, dim)
        if (start_key := _start_key(key, factor)) in wanted:
            apart[start_key] = -start if dim else start
    return apart


def _factor(key: str) -> str | None:
    return next((factor for factor in _FACTORS if key.endswith(f".{factor}")), None)


def _start_key(key: str, factor: str) -> str:
    return key.removesuffix(factor) + ("start_B" if _FACTORS[factor] else "start_A")
