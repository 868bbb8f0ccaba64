"""Stored weights in files, under the names that transformers and bitsandbytes give them.

4 bits: LAYER.weight, its .absmax (the scales), .quant_map (the code book) and .quant_state.bitsandbytes__nf4 (the rest:
JSON, a byte to a number); where the scales are stored in 8 bits also .nested_absmax and .nested_quant_map.
int8: LAYER.weight, LAYER.SCB (the scales) and LAYER.weight_format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from smidgen.errors import ModelError, raise_all
from smidgen.foreign import parse_json, shown
from smidgen.kernels.dequantize import BOOKS, NESTED_BLOCK, Nested, Packed, block_scales, parts
from smidgen.quant.codes import dynamic_book
from smidgen.quant.quantize import BLOCK_SIZES, DTYPES

_STATE = "quant_state.bitsandbytes__"
_LONGEST_STATE = 4096  # bytes
_STORAGE = (torch.uint8, torch.int8, *DTYPES)  # what two codes to a byte may be passed off as
_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def to_tensors(packed: Packed, name: str) -> dict[str, Tensor]:
    """What a file holds for the layer called `name`: tensors by their names, sharing the memory of codes and scales."""
    weight, beside = _keys(name)
    if packed.kind == "int8":
        row_major = torch.tensor(0, dtype=torch.uint8)
        return {weight: packed.codes, f"{beside}SCB": packed.scales, f"{beside}weight_format": row_major}
    found = {"": packed.codes.view(-1, 1), ".absmax": packed.scales, ".quant_map": torch.tensor(BOOKS[packed.kind])}
    state: dict[str, Any] = {
        "quant_type": packed.kind,
        "blocksize": packed.block_size,
        "dtype": str(packed.dtype).removeprefix("torch."),
        "shape": packed.shape,
    }
    if packed.nested:
        scales, book, offset = packed.nested
        found |= {".nested_absmax": scales, ".nested_quant_map": book.clone()}  # all weights share it, files may not
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    found[f".{_STATE}{packed.kind}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {weight + ending: tensor for ending, tensor in found.items()}


def from_tensors(
    tensors: Mapping[str, Tensor],
    name: str,
    *,
    shape: tuple[int, int] | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Packed:
    """The stored weight of the layer called `name`, sharing the memory of `tensors`, all of which are checked.

    Args:
        tensors: what the files hold, or at least what they hold for this layer.
        shape: (O, I) of the layer; what the file says unless given.
        compute_dtype: what the weight is made dense in; what the file says unless given, which for int8 is float32.

    Raises:
        ModelError: tensors are missing, damaged or do not fit together.
    """
    weight, beside = _keys(name)
    if weight not in tensors:
        raise ModelError(f"{weight}: there is no such tensor")
    if f"{beside}SCB" in tensors:
        packed, keys = _int8(tensors, weight, beside)
    else:
        packed, keys = _four_bits(tensors, weight)
    problems = list(_misfits(packed, keys))
    if shape is not None and packed.shape != shape:
        problems.append(f"{weight}: is {packed.shape} in the file, the layer is {shape}; it is of another model")
    raise_all(ModelError, problems)
    if not block_scales(packed).isfinite().all():
        raise ModelError(f"{keys['scales']}: the scales are not finite; the file is damaged, fetch it again")
    return packed if compute_dtype is None else packed._replace(dtype=compute_dtype)


def _keys(name: str) -> tuple[str, str]:
    """The name of a layer's weight, and how the names of what stands beside it begin."""
    beside = f"{name}." if name else ""
    return f"{beside}weight", beside


def _int8(tensors: Mapping[str, Tensor], weight: str, beside: str) -> tuple[Packed, dict[str, str]]:
    codes, scales = tensors[weight], tensors[f"{beside}SCB"]
    layout = tensors.get(f"{beside}weight_format")
    problems = []
    if codes.ndim != 2 or not codes.numel():
        problems.append(f"{weight}: must be a matrix, got shape {tuple(codes.shape)}")
    if layout is not None and (layout.dtype != torch.uint8 or layout.numel() != 1 or layout.item() != 0):
        problems.append(
            f"{beside}weight_format: must be 0, row by row; a file of an old bitsandbytes on a GPU is read by that "
            "release alone: load the model in it and save it again"
        )
    raise_all(ModelError, problems)
    packed = Packed("int8", (len(codes), codes.shape[1]), torch.float32, codes, scales.reshape(-1), codes.shape[1])
    return packed, {"codes": weight, "scales": f"{beside}SCB"}


def _four_bits(tensors: Mapping[str, Tensor], weight: str) -> tuple[Packed, dict[str, str]]:
    kinds = [kind for kind in BOOKS if f"{weight}.{_STATE}{kind}" in tensors]
    if len(kinds) != 1:
        wanted = " or ".join(f"{weight}.{_STATE}{kind}" for kind in BOOKS)
        raise ModelError(
            f"{weight}: is not stored in 4 or 8 bits: beside it stands {'both' if kinds else 'no'} {wanted}"
        )
    kind = kinds[0]
    keys = {"codes": weight, "scales": f"{weight}.absmax", "book": f"{weight}.quant_map"}
    more = {"nested.scales": f"{weight}.nested_absmax", "nested.book": f"{weight}.nested_quant_map"}
    nested = any(key in tensors for key in more.values())
    keys |= more if nested else {}
    state_key = f"{weight}.{_STATE}{kind}"
    problems = [f"{key}: there is no such tensor" for key in keys.values() if key not in tensors]
    known = {*keys.values(), state_key}
    problems += [f"{shown(key)}: what is it?" for key in tensors if key.startswith(f"{weight}.") and key not in known]
    raise_all(ModelError, problems)
    state = _state(tensors[state_key], state_key, kind, nested)
    codes, book = tensors[weight], tensors[keys["book"]]
    if codes.dtype not in _STORAGE:
        problems.append(f"{weight}: two codes to a byte must be stored as one of {_STORAGE}, got {codes.dtype}")
    ours = torch.tensor(BOOKS[kind], device=book.device)
    if book.dtype != torch.float32 or book.shape != ours.shape or not torch.allclose(book, ours, atol=1e-4):
        problems.append(f"{keys['book']}: is not the code book of {kind}; the file is damaged or of another kind")
    raise_all(ModelError, problems)
    inner = None
    if nested:
        nested_book = tensors[keys["nested.book"]].reshape(-1)
        shared = dynamic_book().to(nested_book.device)
        inner = Nested(
            tensors[keys["nested.scales"]].reshape(-1),
            shared if torch.equal(shared, nested_book) else nested_book,
            float(state["nested_offset"]),
        )
    packed = Packed(
        kind,  # pyright: ignore[reportArgumentType]
        (state["shape"][0], state["shape"][1]),
        _NAMES[state["dtype"]],
        codes.contiguous().view(-1).view(torch.uint8),
        tensors[keys["scales"]].reshape(-1),
        state["blocksize"],
        inner,
    )
    return packed, keys


def _state(packed: Tensor, key: str, kind: str, nested: bool) -> dict[str, Any]:
    """The fields beside the tensors, checked."""
    if packed.dtype != torch.uint8 or not 0 < packed.numel() <= _LONGEST_STATE:
        raise ModelError(
            f"{key}: must be up to {_LONGEST_STATE:,} bytes of JSON, got {packed.numel():,} numbers of {packed.dtype}"
        )
    state = parse_json(bytes(packed.reshape(-1).tolist()), key, ModelError)
    if not isinstance(state, dict):
        raise ModelError(f"{key}: must hold a JSON object, got {shown(state)}")
    wanted: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "quant_type": (f"'{kind}'", lambda value: value == kind),
        "blocksize": (f"one of {BLOCK_SIZES}", lambda value: _is_count(value) and value in BLOCK_SIZES),
        "dtype": (f"one of {', '.join(_NAMES)}", lambda value: isinstance(value, str) and value in _NAMES),
        "shape": ("two whole numbers above 0", _is_shape),
    }
    if nested:
        wanted |= {
            "nested_blocksize": (f"{NESTED_BLOCK}", lambda value: _is_count(value) and value == NESTED_BLOCK),
            "nested_dtype": ("'float32'", lambda value: value == "float32"),
            "nested_offset": ("a finite number", _is_float32),
        }
    problems = [
        f"{key}: {field} must be {what}, got {shown(repr(state[field])) if field in state else 'nothing'}"
        for field, (what, fits) in wanted.items()
        if field not in state or not fits(state[field])
    ]
    problems += [f"{key}: the field '{shown(field)}' is unknown" for field in state if field not in wanted]
    raise_all(ModelError, problems)
    return state


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))


def _is_float32(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= torch.finfo(torch.float32).max  # which NaN is not


def _misfits(packed: Packed, keys: dict[str, str]) -> Iterator[str]:
    for part in parts(packed):
        if part.tensor.dtype != part.dtype or part.tensor.numel() != part.count:
            yield (
                f"{keys[part.name]}: must be {part.count:,} numbers of {part.dtype} for a weight {packed.shape}, got "
                f"{part.tensor.numel():,} of {part.tensor.dtype}; the file is damaged or of another model"
            )
        elif part.dtype == torch.float32 and not part.tensor.isfinite().all():
            yield f"{keys[part.name]}: holds NaN or infinity; the file is damaged, fetch it again"
