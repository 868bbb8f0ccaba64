"""Trainable tokens: some rows of an embedding are trained in full, all else stays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from smidgen.adapters.base import Adapter, Place, base_modules
from smidgen.adapters.config import TargetConfig
from smidgen.adapters.targets import find_targets
from smidgen.adapters.trained import TokenRows, plan_trained, with_mirrors


@dataclass(kw_only=True)
class TrainableTokensConfig(TargetConfig):
    """The configuration of trainable tokens.

    Args:
        token_indices: the rows to train: ids of tokens.
        target_modules: embeddings or heads; None is the input embedding. A head that is tied to it follows.
        init_weights: start as the rows of the base; False is a random start.
    """

    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    beyond_format: ClassVar[frozenset[str]] = frozenset(
        {"exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "modules_to_save"}
    )

    token_indices: list[int] = field(default_factory=list)
    init_weights: bool = True


class TrainableTokens(TokenRows):
    """Rows `token_indices` of the weight are `trainable_tokens_delta` (n, D)."""

    config_class = TrainableTokensConfig
    field = "token_indices"

    @classmethod
    def plan(cls, model: Any, config: TrainableTokensConfig) -> Iterator[Place]:
        if config.target_modules is None:
            embedding = model.get_input_embeddings()
            config.target_modules = [path for path, module in base_modules(model) if module is embedding]
        targets = find_targets(model, config, accepts=lambda module: isinstance(module, nn.Embedding | nn.Linear))
        places = [Place(path, cls, config) for path in targets]
        yield from with_mirrors(model, [*places, *plan_trained(model, config, targets)], ensure_weight_tying=False)

    def __init__(self, base: Any, config: TrainableTokensConfig, shared: Any = None):
        super().__init__(base, config.token_indices, shared)
        if not config.init_weights:
            nn.init.normal_(self.trainable_tokens_delta)

    def mirror_tensors(self) -> dict[str, Tensor]:
        """The same rows: files hold them for a tied head too."""
        return dict(self.named_parameters())

    def file_key(self, path: str, name: str) -> str:
        return Adapter.file_key(self, path, name)
