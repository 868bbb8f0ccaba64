"""Prompt tuning: the vectors of virtual tokens before every row are all that is trained
(https://arxiv.org/abs/2104.08691).

Legend: N virtual tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from smidgen.adapters.prompts import PromptConfig
from smidgen.adapters.soft import SoftPrompt
from smidgen.errors import UsageError

_SAMPLED = 4096  # rows of the embedding that tell its spread


@dataclass(kw_only=True)
class PromptTuningConfig(PromptConfig):
    """The configuration of prompt tuning. Names and meanings are those of Hugging Face adapter files.

    Args:
        prompt_tuning_init: how the vectors start: "RANDOM" (normal numbers of the embedding's spread), "SAMPLE_VOCAB"
            (the embeddings of random tokens) or "TEXT" (those of a text's tokens, repeated or cut to N).
        prompt_tuning_init_text: that text.
        tokenizer_name_or_path: the tokenizer for it; None: the base model's.
    """

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    refused: ClassVar[dict[str, Any]] = {"tokenizer_kwargs": None}

    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_tuning_init not in ("RANDOM", "SAMPLE_VOCAB", "TEXT"):
            raise UsageError(f"prompt_tuning_init: RANDOM, SAMPLE_VOCAB or TEXT, got '{self.prompt_tuning_init}'")
        if (self.prompt_tuning_init == "TEXT") != bool(self.prompt_tuning_init_text):
            raise UsageError("prompt_tuning_init_text: belongs to prompt_tuning_init TEXT, which needs it")


class PromptTuning(SoftPrompt):
    """[P; E(x)]: P (N, D) is trained."""

    config_class = PromptTuningConfig

    def __init__(self, base: Any, config: PromptTuningConfig, shared: Any = None):
        super().__init__(base, config, shared)
        self.prompt_embeddings = nn.Parameter(self._start(base, config))

    @torch.no_grad()
    def _start(self, base: Any, config: PromptTuningConfig) -> Tensor:
        embedding = base.get_input_embeddings()
        weight = embedding.weight
        if config.prompt_tuning_init == "RANDOM" or config.inference_mode:  # a file brings its own
            noise = torch.randn(self.length, weight.shape[1], device=weight.device)
            return noise * weight[:_SAMPLED].float().std()
        if config.prompt_tuning_init == "SAMPLE_VOCAB":
            ids = torch.randint(weight.shape[0], (self.length,), device=weight.device)
        else:
            config.tokenizer_name_or_path = config.tokenizer_name_or_path or base.name_or_path
            found = base.token_ids(config.prompt_tuning_init_text, config.tokenizer_name_or_path)
            ids = torch.tensor(found, device=weight.device).repeat(-(-self.length // len(found)))[: self.length]
        return embedding(ids).float().clone()

    def vectors(self) -> Tensor:
        return self.prompt_embeddings
