"""FourierFT: the update is a picture with a few trained frequencies (https://arxiv.org/abs/2405.03003).

Legend: the weight is a matrix (out, in), n the number of frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smidgen.adapters.config import WeightConfig, whole_number
from smidgen.adapters.targeted import Additive, device_of
from smidgen.errors import TargetError


@dataclass(kw_only=True)
class FourierFTConfig(WeightConfig):
    """The configuration of FourierFT. Names and meanings are those of Hugging Face adapter files.

    Args:
        n_frequency: how many frequencies are trained at each layer.
        scaling: what the update is multiplied by.
        random_loc_seed: the seed that chooses the frequencies; they are not saved.
        n_frequency_pattern: another number for modules whose path ends with a regular expression.
        init_weights: start as the base model; False, as the paper does, starts with a random spectrum.
    """

    peft_type: ClassVar[str] = "FOURIERFT"
    patterns: ClassVar[dict[str, str]] = {"n_frequency_pattern": "n_frequency"}

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int | None = 777
    n_frequency_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: bool = False

    def problems(self) -> list[str]:
        lines = super().problems() + whole_number("random_loc_seed", self.random_loc_seed, 0, 2**63 - 1)
        return lines + self.whole_numbers("n_frequency", "n_frequency_pattern", most=2**31)


class FourierFT(Additive):
    """W + s Re(ifft2(S)): S is zero but for `fourierft_spectrum` (n,) at places that a seed chooses."""

    config_class = FourierFTConfig
    places: Tensor

    def __init__(self, base: Any, config: FourierFTConfig, shared: Any = None):
        super().__init__(base, config, shared)
        size, device = self.layer.shape[0] * self.layer.shape[1], device_of(base)
        if config.n_frequency > size:
            raise TargetError(f"n_frequency: {config.n_frequency} is more than the {size} numbers of the weight")
        self.scaling = config.scaling
        generator = torch.Generator().manual_seed(config.random_loc_seed)  # type: ignore[arg-type]
        places = torch.randperm(size, generator=generator)[: config.n_frequency]
        self.register_buffer("places", places.to(device), persistent=False)
        start = torch.zeros if config.init_weights else torch.randn
        self.fourierft_spectrum = nn.Parameter(start(config.n_frequency, device=device))

    def delta(self) -> Tensor:
        out, inputs = self.layer.shape
        spectrum = self.fourierft_spectrum.float()
        dense = spectrum.new_zeros(out * inputs).index_put((self.places,), spectrum)
        return self.scaling * torch.fft.ifft2(dense.view(out, inputs)).real
