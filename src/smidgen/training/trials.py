"""What lives during a step of a model that is not there, measured on the same model with two layers and with four.

Each layer and each token adds the same, so what the whole model takes follows. On this machine's CPU the small models
are real, with random weights, and compute as a training does, with the kernels. For other devices they have no memory,
and run in plain PyTorch, as there.

The peak of a deep model comes before the backward pass has left the last layer, when all layers keep what they need.
What lives later, such as the gradient of the embedding, may be more in a shallow one, and does not grow with layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from smidgen.adapters.base import in_adapter
from smidgen.adapters.methods.full import layer_list
from smidgen.data.rows import COMPLETE, TokenRows
from smidgen.models.fuse import fused
from smidgen.models.peft_model import get_peft_model
from smidgen.models.scores import learned, losses_at, vocabulary_size
from smidgen.models.shapes import layer_count, linear_weights, model_of, with_layers
from smidgen.recipe import Recipe, adapter_config
from smidgen.recipe_parts import Optimizer
from smidgen.registry import METHODS
from smidgen.training.objectives import Collating, Objective
from smidgen.training.optimizers.states import held_bytes
from smidgen.training.plan import LiveBytes, empty_gradients, one_pass
from smidgen.training.setup import checkpoint_layers, free_base

LAYERS = (2, 4)
LARGEST_REAL = 5e8  # parameters of a small model that is tried for real; it has the whole vocabulary
PASSES = 3  # of which the fastest counts: a difference of times is far less exact than they are


@dataclass(frozen=True)
class Counted:
    """What a whole model is made of.

    linear: the numbers of the weights that may be stored in few bits, and of the largest of them.
    other: bytes of all else that is not trained. trained: numbers that are.
    layers: how many layers the backward pass goes through, of `all_layers`. products: numbers of all matrices.
    states: bytes of the states that stay in memory, by optimizer.
    """

    linear: int
    largest: int
    other: int
    trained: int
    layers: int
    all_layers: int
    products: int
    states: dict[str, int]


@dataclass(frozen=True)
class Lived:
    """What a step takes: bytes, and seconds.

    deep: the most until the backward pass left the last layer; logits: of that. whole: the most of all.
    """

    deep: float
    logits: float
    whole: float
    seconds: float

    @property
    def activations(self) -> float:
        return max(self.deep, self.whole) - self.logits


@dataclass(frozen=True)
class Growth:
    """`Lived` by layers (`LAYERS`) and by two numbers of tokens, as an array (2, 2, 4)."""

    tokens: tuple[int, int]
    values: np.ndarray

    def at(self, layers: int, tokens: int) -> Lived:
        """What a step takes with so many layers and tokens."""
        few, many = self.tokens
        by_layers = self.values[:, 0] + (self.values[:, 1] - self.values[:, 0]) * (tokens - few) / (many - few)
        shallow, deeper = (Lived(*line) for line in by_layers.tolist())
        more = (layers - LAYERS[1]) / (LAYERS[1] - LAYERS[0])
        grown = {name: max(0.0, n + (n - getattr(shallow, name)) * more) for name, n in vars(deeper).items()}
        return Lived(**grown | {"logits": deeper.logits, "whole": deeper.whole if more > 0 else grown["whole"]})


def count(config: Any, recipe: Recipe, dtype: torch.dtype) -> Counted:
    """Build the whole model without memory, make trainable what the recipe trains, and count."""
    with FakeTensorMode():
        model = model_of(config, dtype)
        sizes = {id(weight): weight.numel() for weight in linear_weights(model)}
        matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
        _make_trainable(model, recipe)
        frozen = [p for name, p in model.named_parameters() if not p.requires_grad and not in_adapter(name)]
        linear = [sizes[id(p)] for p in frozen if id(p) in sizes]
        layers = layer_count(config)
        return Counted(
            linear=sum(linear),
            largest=max(linear, default=0),
            other=sum(p.nbytes for p in frozen if id(p) not in sizes),
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            layers=layers - _first_trained(model),
            all_layers=layers,
            products=matrices,
            states={optim: held_bytes(model, optim) for optim in get_args(Optimizer)},
        )


def is_small(config: Any) -> bool:
    """Whether the model with few layers is small enough to be tried for real."""
    with torch.device("meta"):
        model = model_of(with_layers(config, LAYERS[-1]), torch.float32)
    return sum(p.numel() for p in model.parameters()) <= LARGEST_REAL


def grow(config: Any, recipe: Recipe, dtype: torch.dtype, rows: tuple[int, float], tokens: int, real: bool) -> Growth:
    """Measure steps of few layers.

    Args:
        rows: the tokens of the longest row, and the share of a row that is learned.
        tokens: computed at once, and half as many.
        real: run on this CPU, with memory and time.
    """
    made = [_rows(*rows, size) for size in (max(2, tokens // 2), max(4, tokens))]
    values = [
        [list(vars(_lived(with_layers(config, layers), recipe, dtype, some, real)).values()) for some in made]
        for layers in LAYERS
    ]
    return Growth((len(made[0].ids), len(made[1].ids)), np.array(values))


def _lived(config: Any, recipe: Recipe, dtype: torch.dtype, rows: TokenRows, real: bool) -> Lived:
    objective = Objective()  # others pass the same tokens through the same layers
    batch = objective.collate(rows, range(len(rows)), Collating(len(rows.ids), False, 0))[0]
    at = learned(batch)  # which is not known of tensors without values
    with nullcontext() if real else FakeTensorMode(allow_non_fake_inputs=True):
        model = model_of(config, dtype)
        autocast = _make_trainable(model, recipe, layer_count(config))
        model.train()
        live, until = LiveBytes(vocabulary_size(model)), []
        with fused(model, lambda line: None) if real else nullcontext(), empty_gradients(model):
            with live, _when_left(_last_layer(model), lambda: until.append(live.peak)):
                if real:
                    one_pass(model, objective, batch, autocast)
                else:
                    with torch.autocast("cpu", autocast, enabled=autocast is not None):
                        loss = losses_at(model, batch, at).sum()
                    loss.backward()
            seconds = min(one_pass(model, objective, batch, autocast) for _ in range(PASSES)) if real else 0.0
    deep = until[0] if until else live.peak
    return Lived(sum(deep), deep[1], sum(live.peak), seconds)


def _last_layer(model: nn.Module) -> nn.Module:
    path, layers = layer_list(model)
    return model.get_submodule(f"{path}.{layers - 1}")


@contextmanager
def _when_left(layer: nn.Module, tell: Callable[[], None]) -> Iterator[None]:
    """Inside the block, `tell` is called when the backward pass has left a layer for what is below it."""

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: tell())

    handle = layer.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _make_trainable(model: Any, recipe: Recipe, layers: int | None = None) -> torch.dtype | None:
    """Attach the recipe's adapter, or free the base; in all `layers` of a small model. Answer the arithmetic's dtype.

    How an adapter starts does not count, and may need weights.
    """
    method, config = METHODS[recipe.adapter["method"]].load(), adapter_config(recipe.adapter)
    small = {"layers_to_transform": None, "num_layers": layers} if layers else {}
    for name, value in ({"init_lora_weights": True, "mask_type": "random"} | small).items():
        if hasattr(config, name):
            setattr(config, name, value)
    model.requires_grad_(False)
    autocast = None
    if hasattr(method, "select"):
        autocast = free_base(model, method, config)
    else:
        get_peft_model(model, config)
    if recipe.train.gradient_checkpointing:
        checkpoint_layers(model)
    return autocast


def _first_trained(model: Any) -> int:
    """The number of the first layer that the backward pass reaches."""
    path, first = layer_list(model)
    started = False
    for name, parameter in model.named_parameters():
        inside = name.startswith(f"{path}.")
        started = started or inside
        if parameter.requires_grad and inside:
            first = min(first, int(name[len(path) + 1 :].partition(".")[0]))
        elif parameter.requires_grad and (not started or name.startswith("adapters.")):
            return 0  # the embedding, or an adapter around the whole model
    return first


def _rows(longest: int, share: float, tokens: int) -> TokenRows:
    """Rows of `longest` tokens, as many as fit into `tokens`, of which the last share is learned."""
    length = min(longest, tokens)
    rows = max(1, tokens // length)
    supervised = np.arange(length) >= length - max(1, round(share * length))
    return TokenRows(
        ids=np.zeros(rows * length, dtype=np.int32),
        learned=np.tile(supervised, rows),
        offsets=np.arange(rows + 1) * length,
        file=np.zeros(rows, dtype=np.int32),
        line=np.arange(rows),
        state=np.full(rows, COMPLETE, dtype=np.uint8),
        digest=np.arange(rows, dtype=np.uint64),
        files=("",),
        order=np.arange(rows),
    )
