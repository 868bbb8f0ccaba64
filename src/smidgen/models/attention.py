"""The kernel's attention, as an implementation that a model of transformers can be told to use.

transformers makes a mask of pairs from a function of the row, the query and the key. Where that function says no more
than which tokens belong together, their segments take the place of the mask: of packed rows, of padding, of plain rows.
Every other call (a cache, a mask by the caller, dropped weights, compilation) goes to the attention the model had.

Letters: B rows, T tokens, H heads, D head width, S segments.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from smidgen import kernels
from smidgen.data.packing import Branches
from smidgen.errors import UsageError
from smidgen.kernels.attention import Scores, Spread
from smidgen.kernels.native import autocast

# What the implementation is called in place of the model's own.
NAMES = {own: f"smidgen_{own}" for own in ("sdpa", "eager")}
# Where it is noted how each module attends, while that is asked for.
SEEN: ContextVar[dict[nn.Module, Scores] | None] = ContextVar("seen", default=None)
_QUERIES = 256  # that are compared with all keys at a time


@dataclass(frozen=True)
class Segments:
    """Stands in the place of a mask: the tokens of a batch, one row after the other, in causal segments.

    Attributes:
        offsets: (S + 1,) int64, where segments begin and end among the B T tokens. Padding is a segment of its own.
        window: a token sees this many, itself counted; None: all before it in its segment.
        own_mask: makes the mask that the model's own attention takes.
        spread: how tokens stand as they attend, where some do so in several rows.
    """

    offsets: Tensor
    window: int | None
    own_mask: Callable[[], Tensor | None]
    spread: Spread | None = None


# The branches of the batch that is computed now.
BRANCHES: ContextVar[Branches | None] = ContextVar("branches", default=None)


@contextmanager
def branching(branches: Branches | None) -> Iterator[None]:
    """Let a model that attends with the kernel compute rows that share beginnings inside the block."""
    token = BRANCHES.set(branches)
    try:
        yield
    finally:
        BRANCHES.reset(token)


def _no_mask() -> Tensor:
    raise UsageError("rows that share their beginning are computed by the kernel's attention alone")


def use(model: Any) -> None:
    """Let a model, and the models in it, attend with the kernel."""
    _rename(model, NAMES)


def give_back(model: Any) -> None:
    """Let a model attend as it did."""
    _rename(model, {ours: own for own, ours in NAMES.items()})


def in_use(model: Any) -> bool:
    """Whether the model was told to attend with the kernel."""
    return model.config._attn_implementation in NAMES.values()


def _rename(model: Any, names: dict[str, str]) -> None:
    parts = {"": model.config} | {key: getattr(model.config, key) for key in model.config.sub_configs}
    wanted = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    renamed = {key: names.get(name, name) for key, name in wanted.items()}
    if renamed != wanted:
        model.set_attn_implementation(renamed)


def _attend(
    own: str, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query (B, H, T, D), key and value (B, K, T, D), answers (B, T, H, D)."""
    segments = attention_mask if isinstance(attention_mask, Segments) else None
    of_config = getattr(getattr(module, "config", None), "output_attentions", False)
    shows = own == "eager" and options.get("output_attentions", of_config)
    fits = key.shape == value.shape and key.shape[2:] == query.shape[2:]
    if segments is None or not fits or shows or options.get("dropout"):
        mask = attention_mask if segments is None else segments.own_mask()
        return _own_attention(own, module)(module, query, key, value, mask, **options)
    rows, heads, length, width = query.shape
    q, k, v = (autocast(x).transpose(1, 2).reshape(rows * length, x.shape[1], x.shape[3]) for x in (query, key, value))
    scores = Scores(options.get("scaling") or width**-0.5, segments.window, options.get("softcap"))
    if (seen := SEEN.get()) is not None:
        seen[module] = scores
    if segments.spread is not None:
        q, k, v = (kernels.spread_out(x, segments.spread) for x in (q, k, v))
    with torch.autocast("cpu", enabled=False):
        out, _ = kernels.attention(q, k, v, segments.offsets, *scores)
    if segments.spread is not None:
        out = out.index_select(0, segments.spread.kept)
    return out.view(rows, length, heads, -1), None


def _own_attention(own: str, module: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if own != "eager":
        return ALL_ATTENTION_FUNCTIONS[own]
    places = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    return next(place.eager_attention_forward for place in places if hasattr(place, "eager_attention_forward"))


def _mask(own: str, **arguments: Any) -> Segments | Tensor | None:
    """transformers' mask interface: the segments, or the model's own mask where it says more than they would."""
    if (branches := BRANCHES.get()) is not None:
        return Segments(branches.offsets, arguments.get("local_size"), _no_mask, branches.spread)
    own_mask = functools.partial(ALL_MASK_ATTENTION_FUNCTIONS[own], **arguments)
    offsets = None if torch.compiler.is_compiling() else segment_offsets(**arguments)
    return own_mask() if offsets is None else Segments(offsets, arguments.get("local_size"), own_mask)


def segment_offsets(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """Where the segments of a mask begin and end, (S + 1,) int64, or None if the mask is not one of causal segments.

    A token begins a segment if it does not see the one before it. Then every pair of tokens is compared with the mask,
    padding as a query apart: nothing that counts comes of it.

    Args:
        mask_function: whether a query sees a key, of the indices of row, head, query and key.
        attention_mask: (B, T) bool, false on padding.
        local_size: the window of a mask with one.
        use_vmap: the function may be someone else's, which cannot be asked for many pairs at a time.
    """
    whole = q_length == kv_length and q_offset == 0 and kv_offset == 0
    if use_vmap or not whole or torch.device(device).type != "cpu":
        return None
    shape = (batch_size, q_length)
    if attention_mask is not None and attention_mask.shape != shape:
        return None
    valid = None if attention_mask is None or attention_mask.all() else attention_mask
    rows, head = torch.arange(batch_size)[:, None, None, None], torch.zeros(1, 1, 1, 1, dtype=torch.long)
    token = torch.arange(q_length)

    def sees(queries: Tensor, keys: Tensor) -> Tensor:
        """(B or 1, ...) of queries and keys that broadcast to two dimensions."""
        return mask_function(rows, head, queries[None, None], keys[None, None])[:, 0]

    begins = torch.ones(shape, dtype=torch.bool)
    begins[:, 1:] = ~sees(token[1:, None], token[:-1, None])[..., 0]
    if valid is not None:
        begins[:, 1:] |= valid[:, 1:] != valid[:, :-1]
    first = torch.where(begins, token, 0).cummax(1).values  # that a token sees
    if local_size is not None:
        first = first.maximum(token - local_size + 1)
    narrow = token.int()  # to compare fast
    for queries in token.split(_QUERIES):
        wrong = (narrow >= first[:, queries, None].int()) & (narrow <= narrow[queries, None])  # what is expected
        if valid is None:
            wrong ^= sees(queries[:, None], token[None])
        else:
            wrong ^= sees(queries[:, None], token[None]) & valid[:, None]
            wrong &= valid[:, queries, None]
        if wrong.any():
            return None
    return torch.cat([begins.flatten().nonzero().flatten(), torch.tensor([begins.numel()])])


for _own, _name in NAMES.items():
    AttentionInterface.register(_name, functools.partial(_attend, _own))
    AttentionMaskInterface.register(_name, functools.partial(_mask, _own))
