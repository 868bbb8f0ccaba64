"""Layers that bitsandbytes has loaded: their weights as they are, without a copy and without importing it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smidgen.errors import ModelError
from smidgen.kernels.dequantize import NESTED_BLOCK, Nested, Packed, check
from smidgen.quant.codes import dynamic_book

_BLOCK = 32  # rows that stand side by side in the layout for AVX-512


def packed_of(module: Any, compute_dtype: torch.dtype | None = None) -> Packed | None:
    """The stored weight of a `Linear4bit` or `Linear8bitLt`, or of a class made of one; None for other modules.

    Codes and scales share the module's memory, with one exception: on CPUs with AVX-512 and bfloat16 instructions a
    `Linear4bit` lays its weight out anew when it is called in eval mode, and rounds its scales to bfloat16 for good.
    Then codes and scales are copies, of what the module computes with from then on.

    Args:
        compute_dtype: what the weight is made dense in; unless said, in 4 bits what the module computes in, for int8
            float32.

    Raises:
        ModelError: the module is not quantised yet, or keeps its weight in a way that bitsandbytes did not have.
        UsageError: it was cast, so that codes or scales are of another type.
    """
    layer: Any = module
    names = {kind.__name__ for kind in type(layer).__mro__ if kind.__module__.partition(".")[0] == "bitsandbytes"}
    if "Linear4bit" in names:
        packed = _four_bits(layer, compute_dtype)
    elif "Linear8bitLt" in names and not layer.state.has_fp16_weights:  # otherwise its weight is a plain one
        packed = _int8(layer, compute_dtype)
    else:
        return None
    if packed.shape != (layer.out_features, layer.in_features):
        raise ModelError(
            f"{_told(layer)}: its weight was quantised as {packed.shape}; quantise it as (outputs, inputs) instead"
        )
    check(packed)
    return packed


def _told(module: Any) -> str:
    return f"{type(module).__name__} from {module.in_features} to {module.out_features}"


def _not_quantised(module: Any) -> ModelError:
    return ModelError(
        f"{_told(module)}: bitsandbytes has not quantised its weight yet; move the model to its device first: "
        "model.to('cpu') or model.to('cuda')"
    )


def _int8(module: Any, compute_dtype: torch.dtype | None) -> Packed:
    weight = module.weight
    scales = module.state.SCB if getattr(weight, "SCB", None) is None else weight.SCB  # the first call moves them
    if weight.dtype != torch.int8 or scales is None:
        raise _not_quantised(module)
    codes = weight.data
    return Packed("int8", (len(codes), codes.shape[1]), compute_dtype or torch.float32, codes, scales, codes.shape[1])


def _four_bits(module: Any, compute_dtype: torch.dtype | None) -> Packed:
    state = getattr(module.weight, "quant_state", None)
    state = module.quant_state if state is None else state
    if state is None:
        raise _not_quantised(module)
    laid_out_anew = getattr(state, "packing_format_for_cpu", False)
    dtype = compute_dtype or module.compute_dtype or (state.original_dtype if laid_out_anew else state.dtype)
    nested = None
    if state.nested:
        if state.state2.blocksize != NESTED_BLOCK:
            raise ModelError(f"{_told(module)}: {state.state2.blocksize} scales share a scale; only {NESTED_BLOCK} may")
        book = dynamic_book().to(state.state2.code.device)
        shared = book if torch.equal(book, state.state2.code) else state.state2.code
        nested = Nested(state.state2.absmax, shared, state.offset.item())
    codes, scales = module.weight.data, state.absmax
    if laid_out_anew:
        codes, scales = _row_major(codes), scales.t().float()
    return Packed(
        state.quant_type,
        tuple(state.shape),
        dtype,
        codes.contiguous().view(-1).view(torch.uint8),
        scales.contiguous().view(-1),
        state.blocksize,
        nested,
    )


def _row_major(codes: Tensor) -> Tensor:
    """Codes (O, I / 2), the first of each two in the high half of a byte, of those laid out for AVX-512.

    There 32 rows stand side by side: for each pair of inputs 32 bytes hold the pairs of the rows one after another,
    those of the first 16 rows in the low halves, those of the others in the high halves.
    """
    outputs, half = codes.shape
    bytes_ = codes.reshape(outputs // _BLOCK, half, _BLOCK)
    pairs = torch.cat([bytes_ & 15, bytes_ >> 4], -1).view(outputs // _BLOCK, half, _BLOCK, 2)
    return ((pairs[..., 0] << 4) | pairs[..., 1]).transpose(1, 2).reshape(outputs, half)
