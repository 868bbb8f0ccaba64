"""What tells one base model from another, whatever its folder is called."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from smidgen.adapters.base import in_adapter

_SAMPLES = 32  # values taken at each of three places of a tensor


def fingerprint(model: nn.Module) -> str:
    """Answer a hash that tells base models apart: 32 hex digits.

    Hashed are the kind of model, its head counts, and of each parameter the name, the shape and 96 values (the first,
    middle and last 32) rounded to bfloat16; so float32 and bfloat16 copies of bfloat16 weights are the same model.
    Adapters (`.adapters.` in the name) do not count. Full and freeze tuning change the base: hash it before training.
    """
    config = getattr(model, "config", None)
    fields = ("model_type", "num_attention_heads", "num_key_value_heads")
    digest = hashlib.sha256(repr([getattr(config, field, None) for field in fields]).encode())
    base = sorted((name, p) for name, p in model.named_parameters() if not in_adapter(name))
    samples = []
    for name, parameter in base:
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        flat = parameter.detach().flatten()
        middle = max(0, flat.numel() // 2 - _SAMPLES // 2)
        samples += [part.to(torch.bfloat16) for part in (flat[:_SAMPLES], flat[middle:][:_SAMPLES], flat[-_SAMPLES:])]
    if samples:
        digest.update(torch.cat(samples).cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
