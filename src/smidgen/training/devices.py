"""Where a training may take place: this machine, a card by its name, or a GPU of some size."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from smidgen.errors import UsageError, did_you_mean
from smidgen.models.load import best_device, choose_dtype, free_memory
from smidgen.training.memory import held

GIB = 2**30
CONTEXT = 500_000_000  # bytes that CUDA and its libraries take on a GPU: an estimate, by version and card 0.3 to 0.7 GB
_UNITS = {"": 10**9, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": GIB, "TIB": 2**40}


@dataclass(frozen=True)
class Card:
    """What a data sheet says: bytes, FLOP/s of 16-bit products (None: not told), whether it computes in bfloat16."""

    name: str
    memory: int
    flops: float | None
    bfloat16: bool = True


def _card(name: str, gibibytes: float, teraflops: float | None, bfloat16: bool = True) -> Card:
    return Card(name, int(gibibytes * GIB), teraflops and teraflops * 1e12, bfloat16)


_ALL = (
    _card("RTX 3060", 12, 25.6),
    _card("RTX 3090", 24, 71.2),
    _card("RTX 4060 Ti", 16, 44.0),
    _card("RTX 4090", 24, 165.2),
    _card("RTX 5090", 32, 209.5),
    _card("A6000", 48, 154.8),
    _card("A10", 24, 125.0),
    _card("L4", 24, 121.0),
    _card("L40S", 48, 362.0),
    _card("T4", 16, 8.1, bfloat16=False),  # without bfloat16 the base is float32, at the rate of that
    _card("V100", 32, 15.7, bfloat16=False),
    _card("A100 40", 40, 312.0),
    _card("A100 80", 80, 312.0),
    _card("H100", 80, 989.0),
    _card("H200", 141, 989.0),
    # Of a Mac's memory its GPU may take two thirds, and three quarters of 64 GB and more.
    *(_card(f"Mac {size}", size * (0.75 if size >= 64 else 2 / 3), None, False) for size in (8, 16, 24, 32, 64, 128)),
)
CARDS = {re.sub(r"\W", "", card.name.lower()): card for card in _ALL}


def card(name: str) -> Card:
    """The card of a name, however it is written: "RTX 4090", "rtx-4090", "rtx4090".

    Raises:
        UsageError: there is no such card; the message lists those that there are.
    """
    plain = re.sub(r"[\W_]", "", name.lower())
    if plain not in CARDS:
        near = did_you_mean(plain, CARDS)
        listed = ", ".join(card.name for card in _ALL)
        raise UsageError(f"--device: no '{name}'{near} There are: cpu, cuda, mps, {listed}. For others give --memory.")
    return CARDS[plain]


def size(text: str) -> int:
    """Bytes of a size as people write it: "24GB" (10^9), "24 GiB" (2^30), "24".

    Raises:
        UsageError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT]i?B)?", text.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise UsageError(f"--memory: '{text}' is no size; write it as 24GB or 24GiB")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


@dataclass(frozen=True)
class Device:
    """Where a run would take place.

    memory: bytes that it may hold in all. context: bytes that the device takes for itself; None: measured.
    flops: FLOP/s of its products; None: not told.
    """

    name: str
    kind: str
    memory: int
    dtype: torch.dtype
    context: int | None
    flops: float | None = None


def find_device(name: str | None, memory: str | None, dtype: str) -> Device:
    """The device of a name, or one of that much memory; this machine's fastest where neither is given.

    Args:
        dtype: of the base weights, as a recipe says it.

    Raises:
        UsageError: there is no such device.
    """
    if name and memory:
        raise UsageError("--device and --memory: give one of the two")
    if memory:
        wanted = torch.bfloat16 if dtype == "auto" else choose_dtype(dtype, torch.device("cpu"))[0]
        return Device(f"a GPU of {memory}", "cuda", size(memory), wanted, CONTEXT)
    if name and name not in ("cpu", "cuda", "mps"):
        known = card(name)
        auto = "bfloat16" if known.bfloat16 else "float32"
        wanted = choose_dtype(auto if dtype == "auto" else dtype, torch.device("cpu"))[0]
        return Device(known.name, "mps" if known.flops is None else "cuda", known.memory, wanted, CONTEXT, known.flops)
    here = torch.device(name) if name else best_device()
    if here.type != "cpu" and not getattr(torch, here.type).is_available():
        raise UsageError(f"--device: this machine has no {here.type}; name a card, or give --memory")
    room = free_memory(here) + held(here)
    return Device(f"this machine's {here.type}", here.type, room, choose_dtype(dtype, here)[0], None)
