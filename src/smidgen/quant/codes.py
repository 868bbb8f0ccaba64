"""Code books: what the codes of a stored weight stand for, and where one code ends and the next begins."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from smidgen.kernels.dequantize import BOOKS


@functools.cache
def order(kind: str) -> list[int]:
    """The 16 codes of a 4-bit kind by what they stand for, ascending. FP4 has two zeros: the plain one is first."""
    return sorted(range(16), key=BOOKS[kind].__getitem__)


@functools.cache
def bounds(kind: str) -> list[float]:
    """The 15 midpoints between neighbours of `order`; a number on a midpoint belongs to the lower one."""
    return midpoints(torch.tensor(BOOKS[kind])[order(kind)]).tolist()


def midpoints(book: Tensor) -> Tensor:
    return (book[:-1] + book[1:]) / 2


@functools.cache
def dynamic_book(signed: bool = True) -> Tensor:
    """The dynamic 8-bit code book (256,), ascending (8-bit optimizers, https://arxiv.org/abs/2110.02861).

    A number is a sign, a power of ten from 1e-6 to 1 that takes one bit more for each step down, and a fraction from
    0.1 to 1 in the bits that are left: the middles of 1, 2, 4 ... 64 equal steps. With them 0 and 1. Where there is no
    sign, the fraction has its bit.
    """
    more = 0 if signed else 1
    positive = [10.0 ** (bits - 6) * midpoints(torch.linspace(0.1, 1, 2 ** (bits + more) + 1)) for bits in range(7)]
    negative = [-part for part in positive] if signed else []
    return torch.cat([*positive, *negative, torch.tensor([0.0, 1.0])]).sort().values
