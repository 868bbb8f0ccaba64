"""Quantising a weight: the codes and scales that bitsandbytes finds on a CPU, to the bit.

Letters: O outputs, I inputs, C blocks.
"""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional

from smidgen.errors import ModelError, UsageError, did_you_mean
from smidgen.kernels.dequantize import NESTED_BLOCK, Kind, Nested, Packed
from smidgen.quant.codes import bounds, dynamic_book, midpoints, order

KINDS: tuple[Kind, ...] = get_args(Kind)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHUNK = 2**18  # numbers at once: some megabytes of working memory, a multiple of every block size
_SMALLEST = 1e-38  # the least that is divided by


@torch.no_grad()
def quantize(
    weight: Tensor,
    kind: Kind,
    *,
    double: bool = False,
    block_size: int = 64,
    compute_dtype: torch.dtype | None = None,
) -> Packed:
    """Store a weight in 4 or 8 bits.

    4 bits: each block is divided by its largest magnitude, and each number becomes the code that stands nearest; on a
    midpoint the lower one. int8: each row is divided by its largest magnitude / 127 and rounded, ties to even.

    The mean of the scales, which double quantisation subtracts, is PyTorch's; it may differ in its last bit with
    another number of threads.

    Args:
        weight: (O, I), float32, bfloat16 or float16, on any device. If its rows are not contiguous it is copied once.
        double: store the scales of 4 bits in 8 bits, as QLoRA does.
        block_size: how many numbers share a scale in 4 bits.
        compute_dtype: what it is made dense in; that of `weight` unless said.

    Raises:
        UsageError: an unknown kind, block size or dtype, or a weight that is no matrix.
        ModelError: the weight holds NaN or infinity.
    """
    compute_dtype = compute_dtype or weight.dtype
    problems = []
    if kind not in KINDS:
        problems.append(f"quantize: '{kind}' must be one of {', '.join(KINDS)}{did_you_mean(str(kind), KINDS)}")
    if block_size not in BLOCK_SIZES:
        problems.append(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size}")
    if kind == "int8" and double:
        problems.append("int8 has a scale for each row, and no double quantisation; use nf4 or leave double out")
    for name, dtype in (("the weight", weight.dtype), ("compute_dtype", compute_dtype)):
        if dtype not in DTYPES:
            problems.append(f"{name} must be float32, bfloat16 or float16, got {dtype}")
    if weight.ndim != 2 or not weight.numel():
        problems.append(
            f"only matrices (O, I) are quantised, got shape {tuple(weight.shape)}; leave this weight as it is"
        )
    if problems:
        raise UsageError("\n".join(problems))
    shape = weight.shape[0], weight.shape[1]
    if kind == "int8":
        codes, scales = _rows(weight)
        packed = Packed(kind, shape, compute_dtype, codes, scales, shape[1])
    else:
        codes, scales = _blocks(weight.reshape(-1), kind, block_size)
        packed = Packed(kind, shape, compute_dtype, codes, scales, block_size)
    if not scales.isfinite().all():
        raise ModelError(
            "the weight holds NaN or infinity, which no code stands for; "
            "load the model in the type in which it was saved, or fetch its files again"
        )
    return nested(packed) if double else packed


def nested(packed: Packed) -> Packed:
    """`packed` with its scales in 8 bits.

    Their mean is subtracted, each 256 are divided by their largest magnitude, and rounded to the next of 65,536 steps
    from -1 to 1, whose nearest code is taken.
    """
    device, book, offset = packed.scales.device, dynamic_book(), packed.scales.mean()
    centred = (packed.scales - offset).cpu()  # they are few, and MPS has no float64
    rows = functional.pad(centred, (0, -len(centred) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    scales = rows.abs().amax(1)
    scaled = (rows * (1 / scales)[:, None]).clamp(-1, 1)
    steps = (((scaled + 1) * 0.5).double() * 65535 + 0.5).float().trunc()  # rounded once, as a fused product is
    codes = torch.bucketize(steps * 2 / 65535 - 1, midpoints(book)).to(torch.uint8)
    codes[scales == 0] = 0
    inner = Nested(scales.to(device), book.to(device), offset.item())
    return packed._replace(scales=codes.view(-1)[: len(centred)].to(device), nested=inner)


def bits(packed: Packed) -> float:
    """Stored bits for each number of the weight: codes and scales, without the code books that all weights share."""
    stored = [packed.codes, packed.scales, *([packed.nested.scales] if packed.nested else [])]
    return 8 * sum(tensor.nbytes for tensor in stored) / math.prod(packed.shape)


def _blocks(flat: Tensor, kind: Kind, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes, two to a byte, and the largest magnitude of each block."""
    count = len(flat)
    whole = count - count % block_size
    codes = torch.empty((count + 1) // 2, dtype=torch.uint8, device=flat.device)
    scales = torch.empty(-(-count // block_size), device=flat.device)
    for first in range(0, whole, _CHUNK):
        last = min(first + _CHUNK, whole)
        x = flat[first:last].float().view(-1, block_size)
        largest = x.abs().amax(1)
        scales[first // block_size : last // block_size] = largest
        codes[first // 2 : last // 2] = _nearest((x * (1 / largest.clamp(min=_SMALLEST))[:, None]).view(-1), kind)
    if whole < count:
        x = flat[whole:].float()
        scales[-1] = x.abs().amax().clamp(min=_SMALLEST)
        codes[whole // 2 :] = _nearest(functional.pad(x / scales[-1], (0, count % 2)), kind)
    return codes, scales


def _nearest(x: Tensor, kind: Kind) -> Tensor:
    """The codes of numbers from -1 to 1, two to a byte."""
    place = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for bound in bounds(kind):
        place += x > bound  # 15 comparisons take a third of the time of torch.bucketize
    pairs = (place[::2] << 4) | place[1::2]
    if kind == "nf4":  # whose codes are in order
        return pairs
    codes = torch.tensor(order(kind), dtype=torch.uint8, device=x.device)
    return (codes.repeat_interleave(16) << 4 | codes.repeat(16))[pairs.int()]


def _rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (O, I) int8 and the largest magnitude of each row."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), device=weight.device)
    step = max(1, _CHUNK // weight.shape[1])
    for first in range(0, len(weight), step):
        x = weight[first : first + step].float()
        largest = scales[first : first + step] = x.abs().amax(1)
        factor = (127.0 / largest).nan_to_num(posinf=0.0)  # a row of zeros keeps them
        codes[first : first + step] = torch.round(x * factor[:, None]).to(torch.int8)
    return codes, scales
