"""What a recipe or a file says of LoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from smidgen.adapters.config import fraction
from smidgen.adapters.init.config import LoraStart, StartConfig


@dataclass(kw_only=True)
class LoraConfig(StartConfig):
    """The configuration of LoRA. Names and meanings are those of Hugging Face adapter files.

    Args:
        r: the rank of the update.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: share of the inputs of the update that is dropped in training.
        use_rslora: scale by lora_alpha / sqrt(r) instead.
        use_dora: learn the magnitude of each output's weights apart from their direction.
        rank_pattern: another rank for modules whose path ends with a regular expression.
        alpha_pattern: another lora_alpha likewise.
        bias: train biases too: "none", "lora_only" (of the target modules) or "all".
        lora_bias: the update has a bias of its own.
        trainable_token_indices: rows of the input embedding to train in full: ids, or ids for each embedding's name.
        ensure_weight_tying: layers that share one weight go on sharing it when it is adapted.
        target_parameters: names that the path of a parameter ends with, such as "experts.gate_up_proj": the experts of
            a mixture, all in one parameter. `target_modules` is [] where nothing else is meant.
    """

    peft_type: ClassVar[str] = "LORA"
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
    refused: ClassVar[dict[str, Any]] = {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "kasa_config": None,
        "layer_replication": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "monteclora_config": None,
        "qalora_group_size": 16,
        "runtime_config": {"ephemeral_gpu_offload": False},
        "use_bdlora": None,
        "use_qalora": False,
        "velora_config": None,
    }

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = True
    target_parameters: list[str] | None = None

    def read_from_file(self) -> None:
        super().read_from_file()
        if self.target_parameters and self.target_modules is None:
            self.target_modules = []  # where a file names parameters alone

    def problems(self) -> list[str]:
        problems = super().problems() + self.whole_numbers("r", "rank_pattern")
        problems += fraction("lora_dropout", self.lora_dropout)
        if self.bias not in ("none", "all", "lora_only"):
            problems.append(f"bias: must be 'none', 'all' or 'lora_only', got {self.bias!r}")
        return problems

    def scaling(self, r: int, alpha: float) -> float:
        """s, what the product of the factors is multiplied by."""
        return alpha / (math.sqrt(r) if self.use_rslora else r)


@dataclass(frozen=True)
class LoraPlace:
    """The configuration of one place, its patterns resolved."""

    config: LoraConfig
    r: int
    scaling: float
    start: LoraStart | None = None  # where it was computed from data
