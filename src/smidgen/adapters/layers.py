"""The kinds of layer that a weight adapter can stand around, each written once.

A method sees every layer as one matrix of shape (out, in): what a linear layer has, what an embedding has
transposed, and what a convolution has once its kernel is folded into the inputs.

Legend: B rows, T tokens, out and in the sides of the matrix, R rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smidgen.quant.linear import QuantizedLinear


class Layer:
    """One layer seen as a matrix (out, in). Subclasses say how its kind stores and applies that matrix."""

    kind = ""

    def __init__(self, module: Any):
        self.module = module

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the weight is; "meta" while it is offloaded."""
        return self.module.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the layer computes in."""
        return self.module.weight.dtype

    def matrix(self, weight: Tensor) -> Tensor:
        """The stored `weight` as a matrix (out, in)."""
        return weight

    def store(self, matrix: Tensor) -> Tensor:
        """A matrix (any, in) in the layout that this kind stores."""
        return matrix

    def linear(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """What this layer would answer to `x` with another matrix (any, in) and bias (any,)."""
        raise NotImplementedError

    def pointwise(self, h: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply `matrix` (out, R) to the channels of `h`, an answer of `linear` with R channels."""
        return F.linear(h, matrix, bias)

    def channels(self, vector: Tensor) -> Tensor:
        """A vector (out,) shaped so that it scales the channels of an answer."""
        return vector


class LinearLayer(Layer):
    """``nn.Linear``: weight (out, in)."""

    kind = "Linear"

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.module.weight.shape
        return rows, columns

    def linear(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, matrix, bias)


class QuantizedLayer(LinearLayer):
    """A linear layer whose weight is stored in 4 or 8 bits: reading it takes time, so nothing here does."""

    kind = "QuantizedLinear"

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.out_features, self.module.in_features

    @property
    def device(self) -> torch.device:
        return self.module.codes.device

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype


class TransposedLinearLayer(LinearLayer):
    """transformers' ``Conv1D`` (GPT-2): a linear layer whose weight is stored (in, out)."""

    kind = "Conv1D"

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.module.weight.shape
        return columns, rows

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def store(self, matrix: Tensor) -> Tensor:
        return matrix.T


class EmbeddingLayer(Layer):
    """``nn.Embedding``: weight (V, D), the transposed matrix of a linear layer whose inputs are one-hot."""

    kind = "Embedding"

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.embedding_dim, self.module.num_embeddings

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def store(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def linear(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        module = self.module
        padding = module.padding_idx if matrix.shape[1] == module.num_embeddings else None
        y = F.embedding(x, matrix.T, padding, module.max_norm, module.norm_type, module.scale_grad_by_freq)
        # Gemma and kin scale what their embedding answers by a factor that they keep on the module.
        scale = getattr(module, "embed_scale", None)
        y = y if scale is None else y * torch.as_tensor(scale, device=y.device, dtype=y.dtype)
        return y if bias is None else y + bias


class ConvLayer(Layer):
    """``nn.Conv1d/2d/3d``: weight (out, in / groups, *kernel); `in` of the matrix is in / groups times the kernel."""

    kind = "Conv"

    @property
    def shape(self) -> tuple[int, int]:
        weight = self.module.weight
        return weight.shape[0], math.prod(weight.shape[1:])

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def store(self, matrix: Tensor) -> Tensor:
        return matrix.unflatten(1, self.module.weight.shape[1:])

    def linear(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        module = self.module
        weight = matrix.unflatten(1, (-1, *module.weight.shape[2:]))
        if weight.shape[1] == module.in_channels != module.weight.shape[1]:
            module = _ungrouped(module)
        return module._conv_forward(x, weight, bias)

    def pointwise(self, h: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        shape = (-1,) + (1,) * (h.dim() - 2)
        y = torch.einsum("or,br...->bo...", matrix, h)
        return y if bias is None else y + bias.view(shape)

    def channels(self, vector: Tensor) -> Tensor:
        return vector.view((-1,) + (1,) * (self.module.weight.dim() - 2))


def _ungrouped(module: Any) -> Any:
    """A view of a grouped convolution that mixes all its channels."""
    view = nn.Module.__new__(type(module))
    view.__dict__.update(module.__dict__, groups=1)
    return view


def layer_of(module: Any) -> Layer | None:
    """Answer how `module` is seen as a matrix, or None where no weight adapter can stand around it."""
    if isinstance(module, QuantizedLinear):
        return QuantizedLayer(module)
    if isinstance(module, nn.Linear):
        return LinearLayer(module)
    if isinstance(module, nn.Embedding):
        return EmbeddingLayer(module)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return ConvLayer(module)
    # transformers' Conv1D is met by its shape, so that this floor need not import transformers.
    if any(base.__name__ == "Conv1D" and hasattr(module, "nf") for base in type(module).__mro__):
        return TransposedLinearLayer(module)
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer, however it stores its weight."""
    return isinstance(layer_of(module), LinearLayer)


class Factor(nn.Module):
    """One factor of the update: a weight, and a bias where the update has one."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)


def product(linear: Any, x: Tensor) -> Tensor:
    """What a small linear layer of an adapter answers, computed in the type of `x`."""
    return F.linear(x, linear.weight.to(x.dtype), None if linear.bias is None else linear.bias.to(x.dtype))
