"""Methods that scale random matrices which all places of one adapter share.

Legend: the weight is a matrix (out, in), R the rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smidgen.adapters.config import WeightConfig, whole_number
from smidgen.adapters.layers import layer_of
from smidgen.adapters.targeted import Factored, device_of
from smidgen.adapters.targets import find_targets


@dataclass(kw_only=True)
class SharedConfig(WeightConfig):
    """What the configurations of VeRA and RandLoRA share.

    Args:
        projection_prng_key: the seed of the shared matrices.
        save_projection: save the shared matrices; else they are drawn again from the seed.
    """

    beyond_format: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})

    projection_prng_key: int = 0
    save_projection: bool = True

    def problems(self) -> list[str]:
        return super().problems() + whole_number("projection_prng_key", self.projection_prng_key, 0, 2**63 - 1)


class Shared(nn.Module):
    """Fixed random matrices that all places of one adapter share: one object, saved once or drawn again from a seed."""

    def __init__(self, matrices: dict[str, Tensor], saved: bool):
        super().__init__()
        for name, matrix in matrices.items():
            self.register_buffer(name, matrix, persistent=saved)


class OverShared(Factored):
    """A factored update whose random matrices all places of the adapter share."""

    shared: Any

    @classmethod
    def share(cls, model: nn.Module, config: Any, paths: list[str]) -> Shared:
        modules = [model.get_submodule(path) for path in find_targets(model, config)]
        shapes = [layer.shape for layer in map(layer_of, modules) if layer is not None]
        outputs, inputs = (max(sides) for sides in zip(*shapes, strict=True))
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        return Shared(cls.draw(config, outputs, inputs, generator), config.save_projection).to(device_of(modules[0]))

    @classmethod
    def draw(cls, config: Any, outputs: int, inputs: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The shared matrices by name, for layers of up to `outputs` and `inputs`."""
        raise NotImplementedError

    def __init__(self, base: Any, config: Any, shared: Any = None):
        super().__init__(base, config, shared)
        self.shared = shared

    def file_key(self, path: str, name: str) -> str:
        if name.startswith("shared."):
            return name.replace("shared.", "base_model.", 1)
        return super().file_key(path, name)
