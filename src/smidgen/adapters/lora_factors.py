"""The factors of LoRA's update, at every kind of layer.

Legend: the weight is a matrix (out, in), R the rank, s the scaling.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smidgen.adapters.base import WeightAdapter
from smidgen.adapters.init import Start
from smidgen.adapters.init.config import LoraStart
from smidgen.adapters.layers import ConvLayer, EmbeddingLayer, Factor, LinearLayer
from smidgen.adapters.lora_config import LoraConfig, LoraPlace
from smidgen.errors import TargetError


class LoraFactors(WeightAdapter):
    """A (R, in) and B (out, R) of an update, stored as the kind of layer asks, with what they start from."""

    lora_A: Factor
    lora_B: Factor
    lora_embedding_A: nn.Parameter
    lora_embedding_B: nn.Parameter
    start_A: Any  # a tensor, or None where the start takes nothing from the weight
    start_B: Any

    def __init__(self, base: Any, config: LoraPlace, shared: Any = None):
        super().__init__(base, config)
        options, layer = config.config, self.layer
        self.r, self.scaling = config.r, config.scaling
        self.groups = getattr(base, "groups", 1)
        self.dropout = nn.Dropout(options.lora_dropout)
        self._check(base, options)
        a, b, offset = self._start(base, config)
        bias = torch.zeros(b.shape[0], device=b.device) if options.lora_bias else None
        if isinstance(layer, EmbeddingLayer):
            self.lora_embedding_A, self.lora_embedding_B = nn.Parameter(a), nn.Parameter(b)
        elif isinstance(layer, ConvLayer):
            kernel = base.weight.shape[2:]
            b = b[:, : self.r // self.groups].reshape(b.shape[0], -1, *[1] * len(kernel)).contiguous()
            self.lora_A, self.lora_B = Factor(a.unflatten(1, (-1, *kernel))), Factor(b, bias)
        else:
            self.lora_A, self.lora_B = Factor(a), Factor(b, bias)
        # Starts that take a part of the weight: the base answers without it, and stays as it is. Where that part cannot
        # be found again from the weight alone it is saved.
        self.register_buffer("start_A", a.clone() if offset else None, persistent=options.is_measured)
        self.register_buffer("start_B", b.clone() if offset else None, persistent=options.is_measured)

    def _check(self, base: Any, options: LoraConfig) -> None:
        if self.r % self.groups:
            raise TargetError(f"r: {self.r} is no multiple of the convolution's {self.groups} groups")
        if self.groups > 1 and options.use_dora:
            raise TargetError(f"use_dora: a convolution with {self.groups} groups has no single weight to decompose")
        if self.layer.device.type == "meta" and (options.use_dora or options.init_name() in ("pissa", "olora")):
            raise TargetError("use_dora, pissa and olora read the weight, which is offloaded: load it into memory")
        if options.lora_bias and isinstance(self.layer, EmbeddingLayer):
            raise TargetError("lora_bias: an embedding has no bias")

    def _start(self, base: Any, config: LoraPlace) -> LoraStart:
        """A and B at the start as matrices, and whether the base is to answer without their product."""
        out_features, in_features = self.layer.shape
        device = self.layer.device
        if device.type == "meta":  # offloaded: the start needs no more than its shape and where it will be computed
            device = torch.device(getattr(getattr(base, "_hf_hook", None), "execution_device", "cpu"))

        def read() -> Tensor:
            matrix = self.layer.matrix(base.weight.detach()).float()
            return matrix.repeat(1, self.groups)  # A mixes all input channels, which a grouped weight does not hold

        start = Start((out_features, in_features * self.groups), device, read)
        a, b, offset = config.config.start(start, config, isinstance(self.layer, LinearLayer))
        if isinstance(self.layer, EmbeddingLayer) and config.config.init_name() != "random":
            # As the reference does, the side of the vocabulary starts at zero, so that rare tokens move first.
            a, b = torch.zeros_like(a), torch.randn_like(b)
        return a, b, offset

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (out, R) as matrices."""
        a, b = self._stored_factors()
        if isinstance(self.layer, ConvLayer):
            a, b = a.flatten(1), b.flatten(1)
            b = torch.block_diag(*b.chunk(self.groups)) if self.groups > 1 else b
        return a, b

    @torch.no_grad()
    def set_factors(self, a: Tensor, b: Tensor) -> None:
        """Take matrices A (n, in) and B (out, n) with n <= R, without groups; ranks beyond n add nothing."""
        own_a, own_b = self._stored_factors()
        beyond = self.r - len(a)
        own_a.copy_(F.pad(a, (0, 0, 0, beyond)).view_as(own_a))
        own_b.copy_(F.pad(b, (0, beyond)).view_as(own_b))

    def _stored_factors(self) -> tuple[Tensor, Tensor]:
        if isinstance(self.layer, EmbeddingLayer):
            return self.lora_embedding_A, self.lora_embedding_B
        return self.lora_A.weight, self.lora_B.weight

    def _update_bias(self) -> Tensor | None:
        return None if isinstance(self.layer, EmbeddingLayer) else self.lora_B.bias

    def _low_rank(self, x: Tensor, dtype: torch.dtype, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """s (B A x + bias), computed in the base's dtype: what is narrow is cast, not the activations."""
        x = x.to(dtype) if x.is_floating_point() else x
        b, bias = self.scaling * b, None if bias is None else (self.scaling * bias).to(dtype)
        return self.layer.pointwise(self.layer.linear(x, a.to(dtype)), b.to(dtype), bias)

    def mirror_tensors(self) -> dict[str, Tensor]:
        """The same update as a tied layer of the other kind holds it: factors swapped and transposed."""
        a, b = self.factors()
        names = ("lora_A.weight", "lora_B.weight")
        if not isinstance(self.layer, EmbeddingLayer):
            names = ("lora_embedding_A", "lora_embedding_B")
        return {names[0]: b.T, names[1]: a.T}

    def file_key(self, path: str, name: str) -> str:
        return super().file_key(path, "base_layer.bias" if name == "bias" else name)
