"""The directions in which a layer's inputs vary most. Letters: B rows, T tokens, N tokens that count, in inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from smidgen.adapters.init import leading_directions
from smidgen.adapters.init.inputs import tokens_of


class Directions:
    """The principal directions (width, in) of all inputs so far, found batch by batch (incremental PCA).

    What is kept of the past are its mean and its directions times their singular values; a batch's deviations from its
    own mean stand below them, and one row for the distance of the two means.
    """

    def __init__(self, width: int):
        self.width, self.count, self.squares = width, 0, 0.0
        self.mean = self.vectors = self.values = torch.empty(0)
        self.settled = torch.zeros(width, dtype=torch.bool)

    def add(self, x: Tensor, tau: float) -> None:
        """Take in x (N, in); fewer tokens than directions say nothing yet."""
        if len(x) < self.width:
            return
        mean = x.double().mean(0)
        rows, total = (x.double() - mean).to(x.dtype), self.count + len(x)
        self.squares += rows.double().square().sum().item()
        if self.count:
            apart = (self.count / total * len(x)) ** 0.5 * (self.mean - mean)
            self.squares += apart.square().sum().item()
            rows = torch.cat([self.values[:, None] * self.vectors, rows, apart[None]])
            mean = (self.count * self.mean + len(x) * mean) / total
        _, values, vectors = leading_directions(rows, 2 * self.width, niter=4, seed=42)
        vectors = vectors * vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
        vectors, values = vectors[: self.width], values[: self.width]
        if self.count:
            self.settled = torch.cosine_similarity(vectors, self.vectors) >= tau
        self.mean, self.count, self.vectors, self.values = mean, total, vectors, values

    def taking(self, mask: Tensor | None, tau: float) -> Callable[[Tensor], None]:
        """What takes in a layer's inputs (B, T, in) at the tokens that count."""
        return lambda inputs: self.add(tokens_of(inputs, mask), tau)

    @property
    def shares(self) -> Tensor:
        """(width,): how much of the inputs' variance each direction explains."""
        return self.values.square() / self.squares
