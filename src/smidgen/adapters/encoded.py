"""Prompts that a small network computes. Files hold what it computes, as other tools read it, and the network too."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.adapters.prompts import Prompt


class EncodedPrompt(Prompt):
    """`vectors` is ``encode()``, until a file without the network makes `prompt_embeddings` a parameter of its own."""

    prompt_embeddings: Any  # a parameter, or None while a network computes it

    def __init__(self, base: Any, config: Any, shared: Any = None):
        super().__init__(base, config, shared)
        self.register_parameter("prompt_embeddings", None)

    def encode(self) -> Tensor:
        """What the network computes, (N, any)."""
        raise NotImplementedError

    def vectors(self) -> Tensor:
        return self.encode() if self.prompt_embeddings is None else self.prompt_embeddings

    def file_tensors(self) -> dict[str, Tensor]:
        return super().file_tensors() | {"prompt_embeddings": self.vectors()}

    @torch.no_grad()
    def fit_file(self, keys: Set[str]) -> None:
        if "prompt_embeddings" in keys and keys.isdisjoint(super().file_tensors()):
            vectors = self.vectors()
            for part in list(self._modules):
                del self._modules[part]
            self.prompt_embeddings = nn.Parameter(vectors)
