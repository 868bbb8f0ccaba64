"""A and B hold what the weight does to inputs like those of the data, or least so; the base answers without it.

CorDA, https://arxiv.org/abs/2406.05223. Legend: the weight W is (out, in), C (in, in) the covariance of its inputs,
N tokens, R rank, s the scaling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from smidgen.adapters.init import Start
from smidgen.adapters.init.inputs import Batch, counted, first_with_same_inputs, run_watched, tokens_of
from smidgen.errors import UsageError

_WORST_INVERSE = 0.05  # || C C^-1 - I ||


@dataclass(kw_only=True)
class CordaConfig:
    """What is particular to CorDA.

    Args:
        corda_method: "ipm" trains the part that matters most for the data (give data of the task), "kpm" the part that
            matters least (give data of what should be kept).
    """

    # Where and how peft keeps what it measured: read in files and left out.
    elsewhere: ClassVar[frozenset[str]] = frozenset(
        {"cache_file", "covariance_file", "verbose", "use_float16_for_covariance", "prune_temporary_fields"}
    )

    corda_method: Literal["ipm", "kpm"] = "ipm"


def measure(model: nn.Module, config: Any, paths: list[str], batches: list[Batch]) -> Callable[[str], Tensor | None]:
    """The mean over batches of X^T X (in, in), X (N, in) the inputs of the layer, their largest value brought to 1.

    None for a layer that data does not reach.

    Raises:
        UsageError: inputs are not finite.
    """
    leaders = first_with_same_inputs(model, paths, batches[0])
    totals: dict[str, Tensor] = {}

    def tell(path: str, mask: Tensor | None) -> Callable[[Tensor], None]:
        def add(inputs: Tensor) -> None:
            x = tokens_of(inputs, mask)
            x = x / x.max().abs().clamp_min(torch.finfo(torch.float32).tiny)
            product = x.T @ x / len(batches)
            totals[path] = totals[path].add_(product) if path in totals else product

        return add

    for batch in batches:
        mask = counted(batch)
        run_watched(model, batch, {path: tell(path, mask) for path in dict.fromkeys(leaders.values())})
    if wrong := [path for path, total in totals.items() if not total.isfinite().all()]:
        raise UsageError(f"batches: the inputs of {len(wrong)} layers are not finite, such as {wrong[0]}")
    return lambda path: totals.get(leaders.get(path, ""))


def initialise(start: Start, r: int, scaling: float) -> tuple[Tensor, Tensor, bool]:
    """W C = U S V^T; of its first (ipm) or last (kpm) R parts B = U sqrt(S/s), A = sqrt(S/s) V^T C^-1.

    C gets a share of its mean diagonal, as much as it needs to have an inverse.
    """
    weight, covariance = start.read(), start.measured.to(start.device)
    identity, share = torch.eye(len(covariance), device=start.device), 0.01
    while True:
        regular = covariance + share * covariance.diagonal().mean() * identity
        inverse = torch.linalg.inv(regular)
        if torch.dist(regular @ inverse, identity) < _WORST_INVERSE:
            break
        share *= 2
    u, s, vh = torch.linalg.svd(weight @ regular, full_matrices=False)
    part = slice(0, r) if start.options.corda_method == "ipm" else slice(max(0, len(s) - r), None)
    root = (s[part] / scaling).sqrt()
    return root[:, None] * (vh[part] @ inverse), u[:, part] * root, True
