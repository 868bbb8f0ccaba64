"""A spans the directions in which a layer's inputs vary most, B is zero (EVA, https://arxiv.org/abs/2410.07170).

Ranks go to the layers whose inputs are explained best by one direction more; the sum stays. Legend: N tokens, in the
inputs of a layer, R rank.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.adapters.init import Start
from smidgen.adapters.init.directions import Directions
from smidgen.adapters.init.inputs import Batch, counted, first_with_same_inputs, run_watched
from smidgen.adapters.layers import layer_of
from smidgen.adapters.targets import find_targets, names_of, pattern_value
from smidgen.errors import UsageError

_MOST_PASSES = 40  # over the batches in turn, for directions that do not settle


@dataclass(kw_only=True)
class EvaConfig:
    """What is particular to EVA.

    Args:
        rho: no layer gets more than rho times its rank; 1: ranks stay as they are.
        tau: directions have settled when their cosine with those before the last batch is at least this.
        use_label_mask: only inputs at supervised tokens count.
        label_mask_value: the label of the others.
        whiten: divide each direction by the root of its singular value.
        adjust_scaling_factors: lora_alpha follows the rank, so that the scaling stays.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if self.rho < 1 or not 0 <= self.tau <= 1:
            raise UsageError(
                f"eva_config: rho must be 1 or more and tau from 0 to 1, got rho {self.rho} and tau {self.tau}"
            )


def measure(model: nn.Module, config: Any, paths: list[str], batches: list[Batch]) -> Callable[[str], Tensor | None]:
    """The directions (R, in) of each layer that data reaches.

    The ranks are written into `config`, and layers without any are left out there.

    Raises:
        UsageError: batches hold too few tokens.
    """
    options = config.eva_config
    ignored = options.label_mask_value if options.use_label_mask else None
    leaders = first_with_same_inputs(model, paths, batches[0])
    ranks = {path: pattern_value(config.rank_pattern, path, config.r) for path in leaders}
    widths: Counter[str] = Counter()
    for path, leader in leaders.items():
        layer = layer_of(model.get_submodule(path))
        assert layer is not None
        widths[leader] = max(widths[leader], min(round(options.rho * ranks[path]), layer.shape[1]))
    found = {leader: Directions(width) for leader, width in widths.items()}
    given = {path: widths[leader] for path, leader in leaders.items()}
    for batch in islice(cycle(batches), max(_MOST_PASSES, len(batches))):
        if not (going := _unsettled(found, given)):
            break
        mask = counted(batch, ignored)
        run_watched(model, batch, {leader: found[leader].taking(mask, options.tau) for leader in going})
        if all(own.count for own in found.values()):
            given = _share_out(found, leaders, sum(ranks.values()))
    most = max(widths.values())
    if not all(own.count for own in found.values()):
        raise UsageError(f"batches: each needs {most} tokens that count, for as many directions; give larger batches")
    if going := _unsettled(found, given):
        told = f"eva: directions of {len(going)} of {len(found)} inputs did not settle; more batches help"
        warnings.warn(told, stacklevel=3)
    _write(config, model, ranks, given)

    def directions(path: str) -> Tensor | None:
        if path not in leaders:
            return None
        own = found[leaders[path]]
        vectors = own.vectors / own.values.sqrt()[:, None] if options.whiten else own.vectors
        return vectors[: given[path]]

    return directions


def _unsettled(found: dict[str, Directions], given: dict[str, int]) -> list[str]:
    return [leader for leader, own in found.items() if not own.settled[: given[leader]].all()]


def _share_out(found: dict[str, Directions], leaders: dict[str, str], budget: int) -> dict[str, int]:
    """How many of the `budget` directions that explain most each layer has; of equal layers the first has most."""
    order = [*found, *(path for path in leaders if path not in found)]
    shares = [found[leaders[path]].shares for path in order]
    owners = [path for path, own in zip(order, shares, strict=True) for _ in own]
    best = torch.cat(shares).argsort(descending=True)[:budget].tolist()
    counts = Counter(owners[index] for index in best)
    given = {path: counts[path] for path in leaders}
    for path, leader in leaders.items():
        if given[path] > given[leader]:
            given[path], given[leader] = given[leader], given[path]
    return given


def _write(config: Any, model: nn.Module, ranks: dict[str, int], given: dict[str, int]) -> None:
    """Say in the configuration which layer has which rank."""
    targets = find_targets(model, config)
    new_ranks, new_alphas = {}, {}
    for path in targets:
        rank = pattern_value(config.rank_pattern, path, config.r)
        alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
        new = given.get(path, rank)
        if new and new != rank and config.eva_config.adjust_scaling_factors:
            alpha *= new / rank
        if new and new != config.r:
            new_ranks[path] = new
        if new and alpha != config.lora_alpha:
            new_alphas[path] = alpha
    config.rank_pattern, config.alpha_pattern = new_ranks, new_alphas
    left = [path for path in targets if given.get(path, 1)]
    if len(left) < len(targets):
        config.target_modules = names_of(model, left)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def initialise(start: Start, r: int, scaling: float) -> tuple[Tensor, Tensor, bool]:
    """A = the directions of the inputs, B = 0."""
    a = start.measured.to(start.device, torch.float32)
    return a.contiguous(), torch.zeros(start.shape[0], r, device=start.device), False
