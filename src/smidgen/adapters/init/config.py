"""The part of LoRA's configuration that is about the start, and how a place gets its start."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from torch import Tensor

from smidgen.adapters.config import TargetConfig, part_of, whole_number
from smidgen.adapters.init import Start
from smidgen.adapters.init.corda import CordaConfig
from smidgen.adapters.init.eva import EvaConfig
from smidgen.adapters.init.loftq import LoftQConfig
from smidgen.adapters.init.lora_ga import LoraGAConfig
from smidgen.errors import TargetError
from smidgen.registry import LORA_INITS, lookup

LoraStart: TypeAlias = tuple[Tensor, Tensor, bool]  # A, B, and whether the base answers without them
# Starts that need more than the weight, each with its part of the configuration.
MEASURED = {"eva": EvaConfig, "corda": CordaConfig, "lora_ga": LoraGAConfig, "loftq": LoftQConfig}
TAKING = ("corda", "lora_ga")  # those that take a part of the base which only their data could tell again


@dataclass(kw_only=True)
class StartConfig(TargetConfig):
    """How the factors start.

    Args:
        init_lora_weights: True, False (random), "gaussian", "pissa", "pissa_niter_[n]" (a faster approximation),
            "olora", "orthogonal", and, after `smidgen.initialise_from`, "eva", "corda", "lora_ga" and "loftq". From
            "pissa" on they apply to linear layers; others start as with True.
        eva_config, corda_config, lora_ga_config, loftq_config: what is particular to one of these starts.
        init_batches: how many micro-batches of the training data a run gives to a start that needs data.
        starts: A, B and whether the base answers without them, of each layer by path, from `smidgen.initialise_from`;
            never in the configuration's file, as the tensors' file holds what is needed.
    """

    beyond_format: ClassVar[frozenset[str]] = frozenset({"init_batches"})

    init_lora_weights: bool | str = True
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    loftq_config: Any = None
    init_batches: int = 16
    starts: dict[str, Any] | None = field(init=False, default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, kind in MEASURED.items():
            chosen = kind() if name == self.init_lora_weights else None
            setattr(self, f"{name}_config", part_of(f"{name}_config", kind, getattr(self, f"{name}_config")) or chosen)
        super().__post_init__()
        self.init_name()

    def problems(self) -> list[str]:
        return super().problems() + whole_number("init_batches", self.init_batches)

    def read_from_file(self) -> None:
        self.starts = {}  # the file holds what it came to

    @property
    def is_measured(self) -> bool:
        """Whether the start needs more than the weight."""
        return self.init_lora_weights in MEASURED

    def init_name(self) -> str:
        """The name of the start in the registry.

        Raises:
            UsageError: there is no such start.
        """
        chosen = self.init_lora_weights
        name = chosen if isinstance(chosen, str) else "default" if chosen else "random"
        name = re.sub(r"^pissa_niter_\d{1,3}$", "pissa", name)
        return lookup(LORA_INITS, name, "init_lora_weights").name

    def check_start(self) -> None:
        """Refuse a start that has not been measured.

        Raises:
            TargetError: `smidgen.initialise_from` is to be called first.
        """
        if self.is_measured and self.starts is None:
            source = "weights" if self.init_lora_weights == "loftq" else "batches"
            raise TargetError(
                f"init_lora_weights: '{self.init_lora_weights}' needs more than the weights of the base: call "
                f"smidgen.initialise_from(model, config, {source}=...) before attaching"
            )

    def start(self, start: Start, place: Any, linear: bool) -> LoraStart:
        """The factors of one place; `place` has its `r`, `scaling`, and its `start` where that was measured.

        Raises:
            TargetError: the measured one is of another rank or shape.
        """
        name, taken = self.init_name(), False
        if name in MEASURED:
            if linear and place.start is not None:
                a, b, offset = place.start
                if a.shape != (place.r, start.shape[1]) or b.shape != (start.shape[0], place.r):
                    raise TargetError(
                        f"init_lora_weights: '{name}' was measured for rank {len(a)} of another layer or "
                        f"configuration, not for rank {place.r}; call smidgen.initialise_from again"
                    )
                return a.to(start.device).clone(), b.to(start.device).clone(), offset
            name, taken = "default", name in TAKING and linear and self.starts == {}
        name = name if linear or name in ("random", "gaussian") else "default"
        steps = re.fullmatch(r"pissa_niter_(\d+)", str(self.init_lora_weights))
        more = {"niter": int(steps[1])} if steps and name == "pissa" else {}
        a, b, offset = LORA_INITS[name].load()(start, place.r, place.scaling, **more)
        return a, b, offset or taken
