"""SHiRA: a few single entries of each weight are trained (https://arxiv.org/abs/2406.13175).

Legend: the weight is a matrix (out, in), n the number of trained entries.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smidgen.adapters.config import WeightConfig, whole_number
from smidgen.adapters.masks import DATA_MASKS, MASKS
from smidgen.adapters.targeted import Additive, device_of
from smidgen.errors import TargetError, did_you_mean


@dataclass(kw_only=True)
class ShiraConfig(WeightConfig):
    """The configuration of SHiRA. Names and meanings are those of Hugging Face adapter files.

    Args:
        r: as many entries are trained as LoRA of this rank has: r (in + out).
        mask_type: which entries: "random", "magnitude" (the largest), "gradient" or "fisher" (those that data moves
            most: a run scores its training data; else give `scores` before the adapter is attached).
        init_batches: how many micro-batches of the training data a run scores.
        random_seed: the seed of the random mask.
        scores: of each target layer by path, (out, in), from `smidgen.adapters.masks.score_weights`; never saved, as
            the file holds the positions.
    """

    peft_type: ClassVar[str] = "SHIRA"
    beyond_format: ClassVar[frozenset[str]] = frozenset(
        {"bias", "exclude_modules", "init_batches", "layers_to_transform", "layers_pattern"}
    )

    r: int = 32
    mask_type: str = "random"
    init_batches: int = 16
    random_seed: int | None = None
    scores: dict[str, Any] | None = field(init=False, default=None, repr=False, compare=False)

    def problems(self) -> list[str]:
        lines = super().problems() + whole_number("r", self.r) + whole_number("init_batches", self.init_batches)
        if self.random_seed is not None:
            lines += whole_number("random_seed", self.random_seed, 0, 2**63 - 1)
        return lines

    @property
    def is_measured(self) -> bool:
        """Whether data choose the entries."""
        return self.mask_type in DATA_MASKS

    def read_from_file(self) -> None:
        self.scores = {}  # the positions come with the file, whatever its mask was called


class Shira(Additive):
    """W + `shira_weight` (n,) at the entries `shira_indices` (2, n)."""

    config_class = ShiraConfig
    shira_indices: Tensor

    @classmethod
    def place_config(cls, config: ShiraConfig, path: str) -> ShiraConfig:
        if config.mask_type not in MASKS and config.scores is None:
            hint = did_you_mean(str(config.mask_type), MASKS)
            raise TargetError(f"mask_type: no '{config.mask_type}'{hint or '.'} There are: {', '.join(MASKS)}.")
        if config.mask_type in DATA_MASKS and config.scores is None:
            raise TargetError(
                f"mask_type: '{config.mask_type}' needs data: set config.scores = "
                "smidgen.adapters.masks.score_weights(model, config, batches) before attaching, or take 'magnitude'"
            )
        own = copy.copy(config)
        own.scores = None if config.scores is None else config.scores.get(path)
        return own

    def __init__(self, base: Any, config: ShiraConfig, shared: Any = None):
        super().__init__(base, config, shared)
        out, inputs = self.layer.shape
        number = config.r * (out + inputs)
        if number > out * inputs:
            raise TargetError(f"r: {config.r} asks for {number} entries, the weight has {out * inputs}")
        device = device_of(base)
        mask = MASKS.get(config.mask_type, MASKS["gradient"])
        flat = mask(self.layer, number, config).sort().values.to(device)
        self.register_buffer("shira_indices", torch.stack([flat // inputs, flat % inputs]).int())
        start = torch.zeros if config.init_weights else torch.randn
        self.shira_weight = nn.Parameter(start(number, device=device))

    def delta(self) -> Tensor:
        rows, columns = self.shira_indices
        return self.shira_weight.new_zeros(self.layer.shape).index_put((rows, columns), self.shira_weight)

    def unfit(self, tensors: dict[str, Any]) -> list[str]:
        indices, sides = tensors["shira_indices"], torch.tensor(self.layer.shape)[:, None]
        if bool(((indices >= 0) & (indices < sides)).all()):
            return []
        return [f"shira_indices: an entry lies outside of the weight {list(self.layer.shape)}"]
