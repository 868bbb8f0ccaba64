"""Linear layers whose weight is stored in 4 or 8 bits and made dense where it is used, once for each use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.kernels.dequantize import Nested, Packed, dense
from smidgen.kernels.lora import lora_linear


class QuantizedLinear(nn.Linear):
    """A frozen linear layer. `weight` is made dense whenever it is read; what is kept are the codes and scales.

    A weight that is set, as merging does, takes the place of the stored one until it is taken away again.
    """

    codes: Tensor
    scales: Tensor
    nested_scales: Tensor | None
    nested_book: Tensor | None
    _how: dict[str, Any]
    _offset: Any  # of the nested scales, a float

    @classmethod
    def take_over(cls, module: Any, packed: Packed) -> None:
        """Make `module` such a layer, in place: one that has a weight or its place, and perhaps a bias."""
        nested = packed.nested
        module.__class__ = cls
        module.out_features, module.in_features = packed.shape
        module._parameters["weight"] = None
        module.register_buffer("codes", packed.codes)
        module.register_buffer("scales", packed.scales)
        module.register_buffer("nested_scales", nested and nested.scales)
        module.register_buffer("nested_book", nested and nested.book)
        module._how = {"kind": packed.kind, "dtype": packed.dtype, "block_size": packed.block_size}
        module._offset = nested and nested.offset

    @property
    def packed(self) -> Packed | None:
        """The stored weight; None while another stands in its place."""
        if self._parameters["weight"] is not None:
            return None
        nested = None
        if self.nested_scales is not None:
            nested = Nested(self.nested_scales, self.nested_book, self._offset)
        shape = self.out_features, self.in_features
        return Packed(shape=shape, codes=self.codes, scales=self.scales, nested=nested, **self._how)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(out, in)."""
        packed = self.packed
        return dense(packed) if packed else self._parameters["weight"]  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight as it is computed with."""
        return self._how["dtype"]

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias, computed in the weight's dtype; the answer is of the dtype of `x`."""
        weight = self.packed or self.weight
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return lora_linear(x.to(self.dtype), weight, bias, ()).to(x.dtype)

    def give_back(self) -> None:
        """Become a plain linear layer with the weight that it answers with now."""
        weight = nn.Parameter(self.weight, requires_grad=False)
        for name in ("codes", "scales", "nested_scales", "nested_book"):
            del self._buffers[name]
        for name in ("_how", "_offset"):
            del self.__dict__[name]
        self.__class__ = nn.Linear  # type: ignore[assignment]
        self._parameters["weight"] = weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Casting the model changes what the weight is made dense in, and moves what is stored: a scale in 16 bits would
        # be another scale.
        self._how["dtype"] = fn(torch.empty(0, dtype=self.dtype)).dtype
        kept = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            self._buffers[name] = tensor.to(fn(tensor.new_empty(0)).device)
        return self
