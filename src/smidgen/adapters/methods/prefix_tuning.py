"""Prefix tuning: trained keys and values of virtual tokens before those of every row, in every layer
(https://arxiv.org/abs/2101.00190). Without projection it is P-tuning v2 (https://arxiv.org/abs/2110.07602).

Legend: B rows, N virtual tokens, L layers, K heads of keys and values of width W.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from smidgen.adapters.base import Inner
from smidgen.adapters.encoded import EncodedPrompt
from smidgen.adapters.prompts import Prompt, PromptConfig, pad_vectors
from smidgen.errors import TargetError, UsageError

_SPREAD = 0.02  # of the numbers at the start
_UNLIKE = ("is_heterogeneous", "num_kv_shared_layers", "global_head_dim")  # of configurations with unlike layers
_NAMES = ("past_key_values", "layer_past")  # what a layer calls the cache


@dataclass(kw_only=True)
class PrefixTuningConfig(PromptConfig):
    """The configuration of prefix tuning. Names and meanings are those of Hugging Face adapter files.

    Args:
        prefix_projection: two layers compute the keys and values from narrower vectors.
        encoder_hidden_size: the width between them; None: that of the keys of a layer.
        init_weights: None for a random start, "zero" for keys and values of zero.
    """

    peft_type: ClassVar[str] = "PREFIX_TUNING"

    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init_weights: Literal["zero"] | None = None


class PrefixTuning(EncodedPrompt):
    """In every layer [P_K; K] and [P_V; V]: the prefix (N, 2 L K W) is trained, or what computes it."""

    config_class = PrefixTuningConfig
    family = "prefixes"
    needs_cache = True

    @classmethod
    def sizes(cls, config: Any) -> dict[str, int]:
        kinds = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
        if kinds or any(getattr(config, name, None) for name in _UNLIKE):
            raise TargetError(
                f"prefix tuning needs keys and values of one shape in every layer; {config.model_type} has layers "
                "of its own kinds: take prompt_tuning or p_tuning"
            )
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return super().sizes(config) | {"num_attention_heads": heads, "token_dim": heads * width}

    def __init__(self, base: Any, config: PrefixTuningConfig, shared: Any = None):
        super().__init__(base, config, shared)
        width, layers, heads = config.token_dim, config.num_layers, config.num_attention_heads
        assert width and layers and heads
        self.shape = (layers, 2, heads, width // heads)
        hidden = config.encoder_hidden_size = config.encoder_hidden_size or width
        spread = 0.0 if config.init_weights == "zero" else _SPREAD
        with base.get_input_embeddings().weight.device:
            if config.prefix_projection:
                self.embedding = nn.Embedding(self.length, width)
                last = nn.Linear(hidden, 2 * layers * width)
                nn.init.normal_(last.weight, std=spread)
                nn.init.zeros_(last.bias)
                self.transform = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), last)
            else:
                self.prompt_embeddings = nn.Parameter(torch.randn(self.length, 2 * layers * width) * spread)

    def encode(self) -> Tensor:
        x = self.embedding.weight
        with torch.autocast(x.device.type, enabled=False):
            return self.transform(x)

    @classmethod
    def take_in(cls, inner: Inner, call: dict[str, Any], prompts: Sequence[Prompt | None], spare: Tensor) -> Any:
        model, cache = inner.module, call["past_key_values"]
        shape = next(prompt.shape for prompt in prompts if isinstance(prompt, cls))
        prefix = pad_vectors(prompts, spare).to(model.get_input_embeddings().weight.dtype).unflatten(2, shape)
        for index, (keys, values) in enumerate(prefix.permute(2, 3, 0, 4, 1, 5)):
            cache.update(keys, values, index)
        begun = cache.get_seq_length()
        with _kept_under_checkpointing(model, cache) as taken:
            answer = inner(**call)
        if not taken and cache.get_seq_length() == begun:
            raise UsageError(f"a {type(model).__name__} took no notice of the prefix in its cache: take prompt_tuning")
        if call.get("use_cache") is False and "past_key_values" in answer:
            answer["past_key_values"] = None
        return answer


@contextmanager
def _kept_under_checkpointing(model: nn.Module, cache: Any) -> Iterator[set[nn.Module]]:
    """Hand the prefix to layers under gradient checkpointing, which drop a cache because they would fill it twice.

    Each run of a layer, the one in the backward pass too, gets a copy of its own. Answers the layers that got one.
    """
    taken: set[nn.Module] = set()
    own = {
        layer: layer.__dict__["_gradient_checkpointing_func"]
        for layer in model.modules()
        if layer.training and getattr(layer, "gradient_checkpointing", False)
    }

    def checkpoint(layer: nn.Module, run: Any, *args: Any) -> Any:
        names = list(inspect.signature(type(layer).forward).parameters)[1:]
        name = next((name for name in _NAMES if name in names), None)
        if name is None:
            return own[layer](run, *args)
        taken.add(layer)
        place = names.index(name)

        def with_prefix(*args: Any) -> Any:
            fresh = copy.copy(cache)
            fresh.layers = [copy.copy(states) for states in cache.layers]
            if len(args) > place:
                return run(*args[:place], fresh, *args[place + 1 :])
            return run(*args, **{name: fresh})

        return own[layer](with_prefix, *args)

    for layer in own:
        layer.__dict__["_gradient_checkpointing_func"] = functools.partial(checkpoint, layer)
    try:
        yield taken
    finally:
        for layer, function in own.items():
            layer.__dict__["_gradient_checkpointing_func"] = function
