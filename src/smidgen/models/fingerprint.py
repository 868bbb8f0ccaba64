"""What tells one base model from another, whatever its folder is called and whatever dtype it is loaded in."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from smidgen.adapters.base import in_adapter
from smidgen.models.quantize import quantized_layers
from smidgen.models.vocabulary import vocabulary_layers, vocabulary_of

_FORM = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}-(?:[0-9a-f]{4})+")
_BLOCK = 32  # values hashed at each of three places of a tensor
_SAMPLES = 4  # values of each tensor that the fingerprint itself holds
_EQUAL_SHARE = 0.9  # of the samples that the same weights keep when they come by way of float16


def fingerprint(model: nn.Module, rows: Mapping[str, int] | None = None, without: Collection[str] = ()) -> str:
    """Answer what tells base models apart: a hash of the structure, a hash of weights, and samples of the weights.

    The structure is the kind of model, its head counts, and the name and shape of each parameter. Of each parameter 96
    values (the first, middle and last 32) are rounded to bfloat16 and hashed, and 4 are kept as hexadecimal digits.
    A weight that is stored in 4 or 8 bits is not what it was: its codes are hashed, and its samples say nothing.
    Adapters do not count, nor do rows that were added to the vocabulary (`models.vocabulary`). Full and freeze tuning
    change the base: take its fingerprint before training.

    Args:
        rows: how many first rows of a layer of the vocabulary count, by its path; None: those of the base.
        without: the paths of modules that do not count.
    """
    layers = vocabulary_layers(model)
    if rows is None:
        rows = dict.fromkeys(layers, vocabulary_of(model).base_rows)
    counted = {id(p): rows[path] for path, layer in layers.items() if path in rows for p in layer.parameters(False)}
    config = getattr(model, "config", None)
    fields = ("model_type", "num_attention_heads", "num_key_value_heads")
    structure = hashlib.sha256(repr([getattr(config, field, None) for field in fields]).encode())
    blocks, samples = [], []
    found: list[tuple[str, torch.Tensor, tuple[int, ...], bool]]
    starts = tuple(f"{path}." for path in without)
    found = [(name, p, tuple(p.shape), True) for name, p in model.named_parameters() if not in_adapter(name)]
    for path, layer in quantized_layers(model):
        found.append((f"{path}.weight", layer.codes, (layer.out_features, layer.in_features), False))
    found = [entry for entry in found if not entry[0].startswith(starts)]
    for name, tensor, shape, known in sorted(found, key=lambda entry: entry[0]):
        if id(tensor) in counted:
            tensor = tensor[: counted[id(tensor)]]
            shape = tuple(tensor.shape)
        structure.update(f"{name} {shape}".encode())
        flat = tensor.detach().flatten()
        middle = max(0, flat.numel() // 2 - _BLOCK // 2)
        blocks += [part.to(torch.bfloat16) for part in (flat[:_BLOCK], flat[middle:][:_BLOCK], flat[-_BLOCK:])]
        sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].to(torch.bfloat16)
        samples.append(sample if known else torch.full_like(sample, math.nan))
    weights = hashlib.sha256(_bytes(blocks)).hexdigest()
    return f"{weights[:16]}-{structure.hexdigest()[:16]}-{_bytes(samples).hex()}"


def is_base_of(model: nn.Module, metadata: Mapping[str, Any]) -> bool:
    """Whether a model is the base that the metadata of an adapter's file names; true where they name none.

    A base that was stored anew has to be the same to the bit. Rows and modules that the adapter replaces may be others:
    what it answers does not depend on them.
    """
    trained_on = metadata.get("base_fingerprint")
    here = fingerprint(model)
    if trained_on is None or (same_base(here, trained_on) and (here == trained_on or not metadata.get("stored_anew"))):
        return True
    if "untouched_fingerprint" not in metadata:
        return False
    here = fingerprint(model, metadata["untouched_rows"], metadata.get("replaced_modules", ()))
    return same_base(here, metadata["untouched_fingerprint"])


def same_base(one: str, other: str) -> bool:
    """Whether two fingerprints are of one base model.

    The same weights have the same fingerprint in float32 and bfloat16. By way of float16 some values are rounded
    twice: then nine in ten samples must be equal and no other may be further than one step of bfloat16 away. Where one
    of the two is quantised, the samples of all other weights decide.
    """
    if one == other:
        return True
    if not (_FORM.fullmatch(one) and _FORM.fullmatch(other)) or len(one) != len(other):
        return False
    (_, structure, samples), (_, other_structure, other_samples) = one.split("-"), other.split("-")
    if structure != other_structure:
        return False
    here, there = _values(samples), _values(other_samples)
    known = ~(here.isnan() | there.isnan())
    here, there = here[known], there[known]
    step = 2.0**-7 * torch.maximum(here.abs(), there.abs())
    return bool(known.any() and (here == there).float().mean() >= _EQUAL_SHARE and ((here - there).abs() <= step).all())


def _bytes(tensors: list[torch.Tensor]) -> bytes:
    return torch.cat(tensors).cpu().view(torch.uint8).numpy().tobytes() if tensors else b""


def _values(samples: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(samples), dtype=torch.bfloat16).float()
