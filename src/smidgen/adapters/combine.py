"""One LoRA adapter from several: weighted sums of their updates or of their factors, pruned, with or without a vote.

Sources: task arithmetic (https://arxiv.org/abs/2212.04089), TIES (https://arxiv.org/abs/2306.01708), DARE
(https://arxiv.org/abs/2311.03099).

Legend: N adapters with weights w and scalings s; A (R, in) and B (out, R) are the factors of one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smidgen.adapters.attach import State, adapted_modules, adapters_of
from smidgen.adapters.config import whole_number
from smidgen.adapters.experts import ParameterLora
from smidgen.adapters.methods.lora import Lora, LoraConfig
from smidgen.adapters.nearest import nearest
from smidgen.adapters.targets import names_of
from smidgen.adapters.trained import Mirror
from smidgen.errors import UsageError, did_you_mean, raise_all

_SIGN_METHODS = ("total", "frequency")
_DRIVERS = (None, "gesvd", "gesvdj", "gesvda")


def _largest(tensor: Tensor, density: float) -> Tensor:
    """`tensor` with its largest entries alone, a share `density` of all."""
    mask = torch.zeros(tensor.numel(), device=tensor.device, dtype=tensor.dtype)
    mask[tensor.abs().flatten().topk(int(density * tensor.numel())).indices] = 1
    return tensor * mask.view(tensor.shape)


def _drawn(tensor: Tensor, density: float) -> Tensor:
    """`tensor` with random entries alone, a share `density` of all, made larger so that its mean stays."""
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


class _Rule(NamedTuple):
    prune: Callable[[Tensor, float], Tensor] | None = None
    votes: bool = False  # each entry is the mean of those that have the sign of the majority


_RULES = {
    "linear": _Rule(),
    "ties": _Rule(_largest, votes=True),
    "dare_linear": _Rule(_drawn),
    "dare_ties": _Rule(_drawn, votes=True),
    "magnitude_prune": _Rule(_largest),
}
COMBINATIONS = ("svd", "cat", *_RULES, *(f"{name}_svd" for name in _RULES if name != "linear"))


@dataclass(frozen=True)
class Combination:
    """How adapters are combined.

    Args:
        kind: "cat" is the exact sum, its rank the sum of the ranks. "svd" is the sum cut off at a rank. "linear" adds
            the factors themselves, which is far from the sum of the updates. "ties" keeps the largest entries and lets
            the majority choose each sign, "dare_linear" and "dare_ties" keep random entries, "magnitude_prune" the
            largest; they act on the factors, and with "_svd" on the updates.
        svd_rank: where the sum is cut off; None is the largest rank of the adapters.
        svd_driver: of the decomposition on CUDA.
        density: the share of entries that are kept.
        majority_sign_method: the sign of the sum ("total") or of most adapters ("frequency").
    """

    kind: str = "svd"
    svd_rank: int | None = None
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"

    @property
    def on_updates(self) -> bool:
        return self.kind.endswith("svd")

    @property
    def rule(self) -> _Rule:
        return _RULES.get(self.kind.removesuffix("_svd"), _RULES["linear"])

    def problems(self) -> list[str]:
        """A line for each option that cannot be meant."""
        if self.kind not in COMBINATIONS:
            hint = did_you_mean(self.kind, COMBINATIONS)
            return [f"combination_type: no '{self.kind}'{hint} There are: {', '.join(COMBINATIONS)}."]
        lines = []
        if self.rule.prune is None and self.density is not None:
            lines.append(f"density: combination_type '{self.kind}' prunes nothing; leave it out")
        if self.rule.prune is not None and not (self.density is not None and 0 < self.density <= 1):
            lines.append(f"density: '{self.kind}' keeps a share of the entries, above 0 to 1; got {self.density!r}")
        if self.majority_sign_method not in _SIGN_METHODS:
            hint = did_you_mean(self.majority_sign_method, _SIGN_METHODS)
            lines.append(f"majority_sign_method: no '{self.majority_sign_method}'{hint} 'total' or 'frequency'")
        if self.svd_driver not in _DRIVERS:
            lines.append(f"svd_driver: must be one of {', '.join(map(str, _DRIVERS))}, got {self.svd_driver!r}")
        if self.svd_rank is not None:
            lines += whole_number("svd_rank", self.svd_rank)
        if not self.on_updates:
            options = {"svd_rank": self.svd_rank, "svd_driver": self.svd_driver}
            lines += [
                f"{name}: combination_type '{self.kind}' decomposes nothing; leave it out"
                for name, value in options.items()
                if value is not None
            ]
        return lines

    def sum(self, tensors: list[Tensor], weights: list[float]) -> Tensor:
        """Combine N tensors of one shape."""
        if self.rule.prune is not None:
            assert self.density is not None
            tensors = [self.rule.prune(tensor, self.density) for tensor in tensors]
        stacked = torch.stack(tensors)
        weighted = stacked * torch.tensor(weights, device=stacked.device).view(-1, *[1] * (stacked.dim() - 1))
        if not self.rule.votes:
            return weighted.sum(0)
        votes = stacked if self.majority_sign_method == "total" else stacked.sign()
        agrees = stacked.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
        return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)

    def factors(self, adapters: list[Lora], weights: list[float], rank: int) -> tuple[Tensor, Tensor]:
        """A and B of the combination at one layer; `rank` is where a sum of updates is cut off."""
        both = [tuple(factor.detach().float() for factor in adapter.factors()) for adapter in adapters]
        scales = [weight * adapter.scaling for adapter, weight in zip(adapters, weights, strict=True)]
        if self.kind == "cat":
            scaled = [scale * a for scale, (a, _) in zip(scales, both, strict=True)]
            return torch.cat(scaled), torch.cat([b for _, b in both], dim=1)
        if self.on_updates:
            layer = adapters[0].layer
            # In the layout of the weight, where the same entries are drawn as elsewhere.
            updates = [layer.store(one.scaling * (b @ a)) for one, (a, b) in zip(adapters, both, strict=True)]
            found = nearest(layer.matrix(self.sum(updates, weights)), rank, self.svd_driver)
            return found.a, found.b
        roots = [math.sqrt(abs(scale)) for scale in scales]
        signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
        return self.sum([a for a, _ in both], signed), self.sum([b for _, b in both], roots)


@torch.no_grad()
def combine(
    model: nn.Module, state: State, adapters: Sequence[str], weights: Sequence[float], how: Combination
) -> tuple[LoraConfig, dict[str, tuple[Tensor, Tensor]]]:
    """The configuration of a combination of LoRA adapters, and its A and B at each path. Nothing is changed.

    Layers that only some of the adapters stand at are combined of these.

    Raises:
        UsageError: an adapter is unknown or is more than low-rank updates, ranks differ, or an option is wrong.
    """
    problems = how.problems() + _weight_problems(adapters, weights)
    problems += [
        f"adapter: no '{name}'{did_you_mean(name, state.configs)} There are: {', '.join(state.configs) or 'none'}."
        for name in adapters
        if name not in state.configs
    ]
    known = [name for name in dict.fromkeys(adapters) if name in state.configs]
    places = {name: dict(adapters_of(model, name)) for name in known}
    for name in known:
        problems += _adapter_problems(name, state.configs[name], places[name])
    mirrored = [{path for path, adapter in places[name].items() if isinstance(adapter, Mirror)} for name in known]
    if any(paths != mirrored[0] for paths in mirrored):
        problems.append("ensure_weight_tying: the adapters tie different layers together; combine those that agree")
    loras: dict[str, dict[str, Any]] = {
        name: {path: adapter for path, adapter in places[name].items() if isinstance(adapter, Lora)} for name in known
    }
    paths = [path for path, _ in adapted_modules(model) if any(path in at for at in loras.values())]
    if how.kind in _RULES:
        problems += _rank_problems(how.kind, paths, loras)
    every = [adapter for at in loras.values() for adapter in at.values()]
    if how.svd_driver in _DRIVERS[1:] and not all(adapter.factors()[0].is_cuda for adapter in every):
        problems.append("svd_driver: only a GPU has a choice of drivers; leave it out")
    raise_all(UsageError, problems)
    largest = how.svd_rank or max(adapter.r for adapter in every)
    factors = {}
    for path in paths:
        here = [(loras[name][path], w) for name, w in zip(adapters, weights, strict=True) if path in loras[name]]
        factors[path] = how.factors([adapter for adapter, _ in here], [weight for _, weight in here], largest)
    rank = max(len(a) for a, _ in factors.values())
    config = replace(
        state.configs[adapters[0]],
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        init_lora_weights=True,
        target_modules=names_of(model, list(factors)),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        ensure_weight_tying=bool(mirrored[0]),
    )
    return config, factors


def _weight_problems(adapters: Sequence[str], weights: Sequence[float]) -> list[str]:
    lines = [] if adapters else ["adapters: name at least one"]
    if len(weights) != len(adapters):
        lines.append(f"weights: {len(weights)} for {len(adapters)} adapters; give each adapter one")
    return lines + [f"weights: must be finite numbers, got {weight}" for weight in weights if not math.isfinite(weight)]


def _rank_problems(kind: str, paths: list[str], loras: dict[str, dict[str, Any]]) -> list[str]:
    for path in paths:
        ranks = {name: at[path].r for name, at in loras.items() if path in at}
        if len(set(ranks.values())) > 1:
            told = ", ".join(f"'{name}' has {r}" for name, r in ranks.items())
            return [f"combination_type '{kind}' adds factors of equal ranks; at {path} {told}: take svd or cat"]
    return []


def _adapter_problems(name: str, config: Any, places: dict[str, Any]) -> list[str]:
    """Why the adapter is more, or other, than an update B A at each of its layers."""
    if not isinstance(config, LoraConfig):
        method = config.peft_type.lower()
        return [f"adapter '{name}': {method} has no factors to combine; make it LoRA first (convert_to_lora)"]
    reasons: dict[str, str] = {}
    for path, adapter in places.items():
        if isinstance(adapter, Lora):
            found = adapter.beside_factors() + ["a convolution with groups"] * (adapter.groups > 1)
        elif isinstance(adapter, ParameterLora):
            found = ["target_parameters"]
        else:
            found = [] if isinstance(adapter, Mirror) else ["what is trained in full (modules_to_save, tokens, biases)"]
        for reason in found:
            reasons.setdefault(reason, path)
    return [
        f"adapter '{name}': {reason} at '{path}' is more than B A, of which there is no weighted sum"
        for reason, path in reasons.items()
    ]
