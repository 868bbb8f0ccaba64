"""P-tuning: a small network computes the vectors of virtual tokens before every row
(https://arxiv.org/abs/2103.10385).

Legend: N virtual tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from smidgen.adapters.encoded import EncodedPrompt
from smidgen.adapters.prompts import PromptConfig
from smidgen.adapters.soft import SoftPrompt
from smidgen.errors import UsageError


@dataclass(kw_only=True)
class PromptEncoderConfig(PromptConfig):
    """The configuration of P-tuning. Names and meanings are those of Hugging Face adapter files.

    Args:
        encoder_reparameterization_type: "MLP" (three layers) or "LSTM" (bidirectional, then two layers).
        encoder_hidden_size: the width inside; None: D.
        encoder_num_layers: layers of the LSTM.
        encoder_dropout: between the layers of the LSTM.
    """

    peft_type: ClassVar[str] = "P_TUNING"

    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (kind := self.encoder_reparameterization_type) not in ("MLP", "LSTM"):
            raise UsageError(f"encoder_reparameterization_type: MLP or LSTM, got '{kind}'")


class PTuning(EncodedPrompt, SoftPrompt):
    """[network(P); E(x)]: P (N, D) and the network are trained."""

    config_class = PromptEncoderConfig

    def __init__(self, base: Any, config: PromptEncoderConfig, shared: Any = None):
        super().__init__(base, config, shared)
        width: Any = config.token_dim
        hidden = config.encoder_hidden_size = config.encoder_hidden_size or width
        with base.get_input_embeddings().weight.device:
            self.embedding = nn.Embedding(self.length, width)
            self.lstm_head = None
            if config.encoder_reparameterization_type == "LSTM":
                layers = config.encoder_num_layers
                between = config.encoder_dropout if layers > 1 else 0.0
                self.lstm_head = nn.LSTM(width, hidden, layers, dropout=between, bidirectional=True, batch_first=True)
                parts = [nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width)]
            else:
                first, second = nn.Linear(width, hidden), nn.Linear(hidden, hidden)
                parts = [first, nn.ReLU(), second, nn.ReLU(), nn.Linear(hidden, width)]
            self.mlp_head = nn.Sequential(*parts)

    def encode(self) -> Tensor:
        x = self.embedding.weight
        with torch.autocast(x.device.type, enabled=False):
            return self.mlp_head(x if self.lstm_head is None else self.lstm_head(x[None])[0][0])
