"""The gated activations of feed-forward layers: SwiGLU and GeGLU (https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from smidgen.kernels.native import Kernel, rows, takes

Activation = Literal["silu", "gelu", "gelu_tanh"]
_KINDS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh")
_forward = Kernel("gated", "pnpnpnnnn")
_backward = Kernel("gated_backward", "pnpnpnppnpnnn")


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, elementwise; `gate` and `up` may be the halves of one tensor."""
    return gated(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor, tanh: bool = False) -> Tensor:
    """GELU(gate) * up, elementwise; `tanh` takes the approximation by tanh, as Gemma and GPT-2 do."""
    return gated(gate, up, "gelu_tanh" if tanh else "gelu")


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up, of one shape; the gradient computes the activation again instead of storing it."""
    if gate.shape != up.shape or not takes(gate, up):
        return gated_reference(gate, up, activation)
    return _Gated.apply(gate, up, activation)


def gated_reference(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """`gated` in plain PyTorch."""
    if activation == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def gated_forward(gate: Tensor, up: Tensor, activation: Activation, out: Tensor | None = None) -> Tensor:
    """The native `gated` without autograd; `out` may have evenly spaced rows."""
    a, b = rows(gate), rows(up)
    y = torch.empty(gate.shape, dtype=gate.dtype) if out is None else out
    into = y.view(-1, y.shape[-1])
    strided = (a, a.stride(0), b, b.stride(0), into, into.stride(0))
    _forward(gate.dtype, *strided, *a.shape, _KINDS.index(activation))
    return y


def gated_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: Activation,
    out: tuple[Tensor, Tensor] | None = None,
    again: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `gate` and `up`.

    Args:
        out: where they go, with rows spaced alike: the halves of one tensor, or `gate` and `up` themselves.
        again: contiguous: gets the forward's result, computed again.
    """
    a, b, g = rows(gate), rows(up), rows(grad)
    of_gate, of_up = out or (torch.empty(gate.shape, dtype=gate.dtype) for _ in range(2))
    spacing = of_gate.view(-1, gate.shape[-1]).stride(0)
    strided = (a, a.stride(0), b, b.stride(0), g, g.stride(0), of_gate, of_up, spacing)
    _backward(gate.dtype, *strided, again, *a.shape, _KINDS.index(activation))
    return of_gate, of_up


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return gated_forward(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        return *gated_backward(grad, gate, up, ctx.activation), None
