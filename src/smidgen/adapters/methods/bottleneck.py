"""Bottleneck adapters: small networks A(x) = s up(activation(down(x))) in each block of a model.

With r what a sublayer is added to and h what it answers, the block goes on with

- houlsby: r + h + A(h), for attention and feed-forward (https://arxiv.org/abs/1902.00751);
- pfeiffer: r + h + A(r + h), for the feed-forward (https://arxiv.org/abs/2005.00247);
- parallel: r + h + A(r), for the feed-forward (https://arxiv.org/abs/2110.04366).

Where a norm follows the sum (BERT), pfeiffer reads the normed sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, cast

from torch import Tensor, nn

from smidgen.adapters.base import Adapter, Inner, Place
from smidgen.adapters.blocks import Met, Reader, blocks
from smidgen.adapters.config import PeftConfig, fraction
from smidgen.adapters.layers import layer_of, product
from smidgen.adapters.trained import plan_trained
from smidgen.errors import TargetError, UsageError, did_you_mean, raise_all

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_new": lambda: nn.GELU(approximate="tanh"),
    "swish": nn.SiLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "leakyrelu": nn.LeakyReLU,
}
# kind: reduction factor, activation and scaling where nothing is said.
_DEFAULTS = {"houlsby": (16.0, "swish", 1.0), "pfeiffer": (16.0, "relu", 1.0), "parallel": (2.0, "relu", 4.0)}


@dataclass(kw_only=True)
class BottleneckConfig(PeftConfig):
    """The configuration of bottleneck adapters. Names are those of adapter-hub.

    Args:
        kind: "houlsby", "pfeiffer" or "parallel".
        reduction_factor: the model's width over that of the bottleneck; None: 16, or 2 for parallel.
        non_linearity: the activation; None: swish for houlsby, else relu.
        scaling: s; None: 1, or 4 for parallel.
        dropout: share of A(x) that is dropped in training.
        leave_out: numbers of the blocks, from 0, that get none.
    """

    peft_type: ClassVar[str] = "BOTTLENECK"
    files: ClassVar[str] = "smidgen"

    kind: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    reduction_factor: float | None = None
    non_linearity: str | None = None
    scaling: float | None = None
    dropout: float = 0.0
    leave_out: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in _DEFAULTS:
            hint = did_you_mean(self.kind, _DEFAULTS)
            raise UsageError(f"kind: no '{self.kind}'{hint} There are: {', '.join(_DEFAULTS)}.")
        for name, default in zip(("reduction_factor", "non_linearity", "scaling"), _DEFAULTS[self.kind], strict=True):
            setattr(self, name, default if getattr(self, name) is None else getattr(self, name))
        problems = fraction("dropout", self.dropout)
        if not 0.01 <= (self.reduction_factor or 0) < 1e6:
            problems.append(f"reduction_factor: must be from 0.01 to a million, got {self.reduction_factor}")
        if self.non_linearity not in ACTIVATIONS:
            problems.append(f"non_linearity: '{self.non_linearity}' is none of {', '.join(ACTIVATIONS)}")
        raise_all(UsageError, problems)


class BottleneckPlace(NamedTuple):
    """One place. `reads`: "h" its layer's answer, "r" or "r + h" with what the block's `Reader` met, "norm" of that."""

    config: BottleneckConfig
    block: str
    reads: str


class Bottleneck(Adapter):
    """Adds A(x), with x as the kind has it, to what a layer answers: `adapter_down` and `adapter_up` are trained."""

    config_class = BottleneckConfig
    met: Met

    @classmethod
    def plan(cls, model: nn.Module, config: BottleneckConfig) -> Iterator[Place]:
        found = blocks(model)
        wrong = [number for number in config.leave_out if not 0 <= number < len(found)]
        raise_all(TargetError, [f"leave_out: no block {number} of {len(found)}" for number in wrong])
        for number, (path, block) in enumerate(found):
            if number in config.leave_out:
                continue
            if config.kind == "houlsby":
                for part in (block.attention, block.feed_forward):
                    yield Place(f"{path}.{part}", cls, BottleneckPlace(config, path, "h"))
            else:
                reads = "r" if config.kind == "parallel" else "norm" if block.norm else "r + h"
                place = BottleneckPlace(config, path, reads)
                yield Place(f"{path}.{block.reader}", Reader, place)
                yield Place(f"{path}.{block.feed_forward}", cls, place)
        yield from plan_trained(model, config, [])

    @classmethod
    def share(cls, model: nn.Module, config: BottleneckConfig, paths: list[str]) -> Met:
        return Met(norms={path: model.get_submodule(f"{path}.{b.norm}") for path, b in blocks(model) if b.norm})

    def __init__(self, base: Any, config: BottleneckPlace, shared: Any = None):
        super().__init__(base, config, shared)
        options, layer = config.config, layer_of(base)
        assert layer is not None
        width, device = layer.shape[0], layer.device
        inside = max(1, int(width // (options.reduction_factor or 1)))
        down = nn.Linear(width, inside, device=device)
        self.adapter_down = nn.Sequential(down, ACTIVATIONS[options.non_linearity]())  # type: ignore[index]
        self.adapter_up = nn.Linear(inside, width, device=device)
        for zero in (down.bias, *self.adapter_up.parameters()):  # so that it starts as the base model
            nn.init.zeros_(zero)
        self.scaling, self.dropout = cast(float, options.scaling), nn.Dropout(options.dropout)
        self.block, self.reads = config.block, config.reads
        self.__dict__["met"] = shared

    def update(self, x: Tensor) -> Tensor:
        """A(x), in the type of x."""
        down, activation = self.adapter_down
        return self.dropout(self.scaling * product(self.adapter_up, activation(product(down, x))))

    def forward(self, inner: Inner, x: Tensor) -> Tensor:
        y = inner(x)
        return y + self.added(inner, x, y)[1]

    def added(self, inner: Inner, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        r = None if self.reads == "h" else self.met.residuals.pop((self.block, inner.group))
        read = y if r is None else r if self.reads == "r" else r + y
        read = self.met.norms[self.block](read) if self.reads == "norm" else read
        return read, self.update(read)
