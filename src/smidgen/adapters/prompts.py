"""Prompts: trained virtual tokens before every row. They stand around the call of the whole model.

What the caller gives and gets has the caller's length: the attention mask, positions and labels are widened below, the
answer is cut back. A cache knows which prompts it holds. Where each row has its own prompt, or none, shorter ones are
padded on the left, so that rows of one batch share a cache.

Legend: B rows, T tokens of the caller, N virtual tokens, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smidgen.adapters.base import Inner, OnModel, Place
from smidgen.adapters.config import PeftConfig
from smidgen.adapters.trained import plan_trained
from smidgen.errors import TargetError, UsageError, raise_all

_HELD = "smidgen_prompts"  # the attribute of a cache: how many virtual tokens of which prompts it holds


@dataclass(kw_only=True)
class PromptConfig(PeftConfig):
    """What the configurations of all prompts hold.

    Args:
        num_virtual_tokens: N.
        token_dim, num_attention_heads, num_layers, num_transformer_submodules: the sizes of the base model, filled in
            when the adapter is attached.
    """

    num_virtual_tokens: int = 20
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # Larger ones in a file are a mistake or an attack on the memory.
        bounds = {"num_virtual_tokens": 10_000, "encoder_hidden_size": 65_536, "encoder_num_layers": 32}
        given = {name: getattr(self, name, None) for name in bounds}
        wrong = [name for name, value in given.items() if value is not None and not 1 <= value <= bounds[name]]
        raise_all(UsageError, [f"{name}: must be from 1 to {bounds[name]:,}, got {given[name]}" for name in wrong])


class Prompt(OnModel):
    """N virtual tokens before every row. Subclasses say what their `vectors` are and how a call takes them in."""

    per_row = True
    needs_cache: ClassVar[bool] = False  # also for a call that keeps none

    @classmethod
    def plan(cls, model: nn.Module, config: PromptConfig) -> Iterator[Place]:
        fit_sizes(config, cls.sizes(text_config(model)))
        yield Place("", cls, config)
        yield from plan_trained(model, config, [])

    @classmethod
    def sizes(cls, config: Any) -> dict[str, int]:
        """The fields of the configuration that the base model's own configuration determines."""
        return {
            "token_dim": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "num_layers": config.num_hidden_layers,
            "num_transformer_submodules": 1,
        }

    def __init__(self, base: Any, config: PromptConfig, shared: Any = None):
        super().__init__(base, config, shared)
        self.length = config.num_virtual_tokens

    def vectors(self) -> Tensor:
        """What the model is given of the virtual tokens, (N, any)."""
        raise NotImplementedError

    @classmethod
    def take_in(cls, inner: Inner, call: dict[str, Any], prompts: Sequence[Prompt | None], spare: Tensor) -> Any:
        """Answer a call that is widened already, with the prompts put before its tokens.

        Args:
            prompts: one for each row.
            spare: (B,), how many columns of padding stand before each row's prompt.
        """
        raise NotImplementedError

    def forward(self, inner: Inner, *args: Any, **kwargs: Any) -> Any:
        return self.answer_rows(inner, [self], *args, **kwargs)

    @classmethod
    def answer_rows(cls, inner: Inner, prompts: Sequence[Prompt | None], *args: Any, **kwargs: Any) -> Any:
        """Answer a call with a prompt, or none, for each row; a single one is for all."""
        call = _by_name(inner.module, args, kwargs)
        tokens = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
        rows, length = tokens.shape[:2]
        prompts = [*prompts] * (rows if len(prompts) == 1 else 1)
        lengths = torch.tensor([prompt.length if prompt else 0 for prompt in prompts], device=tokens.device)
        width = int(lengths.max())
        spare = width - lengths
        cache, key = call.get("past_key_values"), frozenset(map(id, filter(None, prompts)))
        begun, seen = _begun(cache, key)
        if cache is None and cls.needs_cache:
            cache = call["past_key_values"] = inner.module.new_cache()
        _hold(cache, key, width)
        mask, positions = call.get("attention_mask"), call.get("position_ids")
        _check(mask, positions)
        if spare.any():  # rows that differ need what a model otherwise finds out by itself
            mask = tokens.new_ones((rows, seen + length), dtype=torch.long) if mask is None else mask
            positions = (
                torch.arange(seen, seen + length, device=tokens.device)[None] if positions is None else positions
            )
        if mask is not None:
            front = torch.arange(width, device=mask.device) >= spare[:, None]
            call["attention_mask"] = torch.cat([front.to(mask.dtype), mask], dim=1)
        if positions is not None:
            call["position_ids"] = positions + lengths[:, None]
        in_parts = call.get("return_dict") is False
        if in_parts:
            call["return_dict"] = True
        answer = inner(**call) if begun else cls.take_in(inner, call, prompts, spare)
        _hold(answer.get("past_key_values"), key, width)
        return answer.to_tuple() if in_parts else answer


def pad_vectors(prompts: Sequence[Prompt | None], spare: Tensor) -> Tensor:
    """The vectors of each row's prompt, zeros on the left of shorter ones, (B, N, any)."""
    found = {prompt: prompt.vectors() for prompt in dict.fromkeys(filter(None, prompts))}
    some = next(iter(found.values()))
    if not spare.any() and len(found) == 1:
        return some.expand(len(prompts), *some.shape)
    vectors = [some[:0] if prompt is None else found[prompt] for prompt in prompts]
    return torch.stack([F.pad(own, (0, 0, columns, 0)) for own, columns in zip(vectors, spare.tolist(), strict=True)])


def text_config(model: Any) -> Any:
    """The base model's own configuration, of its language half.

    Raises:
        TargetError: it is no model that a prompt can stand before.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_input_embeddings"):
        raise TargetError(f"a prompt stands before the tokens of a language model; a {type(model).__name__} takes none")
    if getattr(config, "is_encoder_decoder", False):
        raise TargetError(
            f"a {type(model).__name__} has an encoder and a decoder; prompts stand before one of them alone"
        )
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def fit_sizes(config: PromptConfig, own: dict[str, int]) -> None:
    """Fill in the sizes of the base model, which a file may have named.

    Raises:
        TargetError: the configuration was made for a model of other sizes.
    """
    given = {name: getattr(config, name) for name in own}
    raise_all(
        TargetError,
        [f"{name}: {given[name]}, the model has {n}" for name, n in own.items() if given[name] not in (None, n)],
    )
    vars(config).update(own)


def _by_name(model: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(model._original_class().forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs


def _begun(cache: Any, key: frozenset[int]) -> tuple[bool, int]:
    """Whether a cache holds these prompts, and how many of the caller's tokens."""
    if getattr(cache, "is_compileable", False):
        raise UsageError("past_key_values: a static cache has no room for a prompt; leave cache_implementation out")
    held = getattr(cache, _HELD, {})
    seen = 0 if cache is None else max(0, int(cache.get_seq_length()) - sum(held.values()))
    if seen and key not in held:
        raise UsageError(f"past_key_values: holds {seen} tokens that were read without this prompt; begin a new cache")
    return key in held, seen


def _hold(cache: Any, key: frozenset[int], width: int) -> None:
    """Let a cache, if there is one, know that it holds `width` virtual tokens of these prompts."""
    if cache is not None:
        vars(cache).setdefault(_HELD, {})[key] = width


def _check(mask: Any, positions: Any) -> None:
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise UsageError(
            "attention_mask: a prompt needs a number for each token, (rows, tokens); a mask of pairs cannot be widened"
        )
    if mask is None and positions is not None and (positions.diff(dim=-1) != 1).any():
        raise UsageError(
            "rows that are packed into one sequence cannot each have a prompt before them: write packing: false"
        )
