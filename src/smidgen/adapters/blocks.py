"""The blocks of models, known by what they are made of: which layers end their sublayers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from smidgen.adapters.base import Adapter, Inner, base_modules
from smidgen.adapters.targets import language_half
from smidgen.errors import TargetError


class Block(NamedTuple):
    """Where things are in one block: the last layer of both sublayers, a layer whose input is the feed-forward's r, and
    the norm after the sum, if there is one."""

    attention: str
    feed_forward: str
    reader: str
    norm: str | None = None


# The children of a block, and where things are in it.
BLOCKS = {
    # Llama and its kin
    frozenset({"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}): Block(
        "self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm"
    ),
    # GPT-2
    frozenset({"ln_1", "attn", "ln_2", "mlp"}): Block("attn.c_proj", "mlp.c_proj", "ln_2"),
    # BERT, RoBERTa
    frozenset({"attention", "intermediate", "output"}): Block(
        "attention.output.dense", "output.dense", "intermediate.dense", "output.LayerNorm"
    ),
}


def blocks(model: nn.Module) -> list[tuple[str, Block]]:
    """The blocks of a model whose parts are known, by path.

    Raises:
        TargetError: there are none.
    """
    found = [
        (path, BLOCKS[names])
        for path, module in base_modules(model)
        if path.startswith(language_half(model))
        and (names := frozenset(name for name, _ in module.named_children())) in BLOCKS
        and not hasattr(module, "residual_multiplier")
    ]
    if not found:
        raise TargetError(
            f"bottleneck adapters know the blocks of Llama, GPT-2 and BERT and of models built like them; a "
            f"{type(model).__name__} has none of these"
        )
    return found


@dataclass
class Met:
    """What the places of one adapter in a block share, by the block's path.

    norms: the norm after the sum, where there is one.
    residuals: r of each group of rows, from when it was met until it is used.
    """

    norms: dict[str, nn.Module]
    residuals: dict[tuple[str, Any], Tensor] = field(default_factory=dict)


class Reader(Adapter):
    """Keeps what a layer was called with, under the name of its block, for an adapter that stands later in it."""

    met: Met

    def __init__(self, base: Any, config: Any, shared: Any = None):
        super().__init__(base, config, shared)
        self.block = config.block
        self.__dict__["met"] = shared

    def forward(self, inner: Inner, x: Tensor) -> Tensor:
        self.met.residuals[self.block, inner.group] = x
        return inner(x)
