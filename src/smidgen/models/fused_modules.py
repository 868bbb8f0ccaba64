"""Modules whose answer a kernel computes: norms, feed-forward layers, activations.

Each kind is a class that is put in front of a module's own, and says how such a module is recognised.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN, NewGELUActivation

from smidgen import kernels
from smidgen.adapters.attach import MadeInPlace, class_without
from smidgen.kernels.gated import Activation, gated
from smidgen.models.scores import intercepted


class FusedModule(MadeInPlace):
    """In front of the class of a module whose answer is a kernel's. how: the settings of the kernel."""

    name: str  # what the modules of a kind are called together
    unused: tuple[str, ...] = ()  # parts that the kernel stands for
    how: Any

    @classmethod
    def settings(cls, module: Any) -> Iterator[Any]:
        """What `how` may be for a module of this kind, the usual first; nothing for other modules."""
        raise NotImplementedError

    def compute(self, x: Tensor) -> Tensor:
        """The module's answer."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plain = len(args) == 1 and not kwargs and not torch.compiler.is_compiling()
        if plain and not any(intercepted(getattr(self, part)) for part in self.unused):
            return self.compute(*args)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def give_back(self) -> None:
        """Make the module what it was."""
        mixin = next(kind for kind in KINDS if isinstance(self, kind))
        del self.__dict__["how"]
        self.__class__ = class_without(type(self), mixin)


class FusedNorm(FusedModule):
    """RMSNorm. how: eps, what is added to the weight, and whether the result is rounded before it is multiplied."""

    name = "norms"
    weight: Tensor
    how: tuple[float, float, bool]

    @classmethod
    def settings(cls, module: Any) -> Iterator[tuple[float, float, bool]]:
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        only_weight = [name for name, _ in module.named_parameters()] == ["weight"] and module.weight.dim() == 1
        if only_weight and isinstance(eps, float):
            yield from ((eps, 0.0, True), (eps, 1.0, False), (eps, 0.0, False), (eps, 1.0, True))

    def compute(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, *self.how)


class FusedFeedForward(FusedModule):
    """down(act(gate(x)) * up(x)). how: the name of the activation."""

    name = "feed-forward layers"
    unused = ("act_fn",)
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    how: Activation

    @classmethod
    def settings(cls, module: Any) -> Iterator[Activation]:
        if _parts(module) == {"gate_proj", "up_proj", "down_proj", "act_fn"} and (
            found := activation_of(module.act_fn)
        ):
            yield found

    def compute(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.how))


class FusedMergedFeedForward(FusedModule):
    """`FusedFeedForward` with gate and up in one layer, as in Phi-3 and GLM."""

    name = FusedFeedForward.name
    unused = ("activation_fn",)
    gate_up_proj: nn.Module
    down_proj: nn.Module
    how: Activation

    @classmethod
    def settings(cls, module: Any) -> Iterator[Activation]:
        if _parts(module) == {"gate_up_proj", "down_proj", "activation_fn"} and (
            found := activation_of(module.activation_fn)
        ):
            yield found

    def compute(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(gated(gate, up, self.how))


class FusedActivation(FusedModule):
    """GELU by tanh, which GPT-2's kin write out in steps: PyTorch has it as one. how: as PyTorch calls it."""

    name = "activations"
    how: str

    @classmethod
    def settings(cls, module: Any) -> Iterator[str]:
        if type(module) is NewGELUActivation:
            yield "tanh"

    def compute(self, x: Tensor) -> Tensor:
        return functional.gelu(x, approximate=self.how)


KINDS = (FusedNorm, FusedFeedForward, FusedMergedFeedForward, FusedActivation)


def _parts(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def activation_of(module: nn.Module) -> Activation | None:
    """Which of the kernel's activations a module is, if it is one."""
    names: dict[str, Activation] = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
    return next((ours for name, ours in names.items() if type(module) is type(ACT2FN[name])), None)
