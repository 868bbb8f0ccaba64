"""Whole decoder layers as two operations (`kernels.block`): recognised by their parts, tried on the loaded weights.

The layers of Llama, Mistral, Qwen2, Qwen3, SmolLM, Gemma 1 to 3, Phi-3 and kin. How a layer attends is taken from a
call of the model itself, and so is the input that it is tried on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.adapters.attach import is_low_rank, linear_of
from smidgen.kernels.attention import Scores
from smidgen.kernels.block import Attention, FeedForward, Where, add_attention, add_feed_forward, autocasted, takes
from smidgen.kernels.dequantize import Packed, Stack, outputs
from smidgen.kernels.gated import Activation
from smidgen.kernels.lora import Linear
from smidgen.kernels.native import autocast
from smidgen.kernels.norms import Norm
from smidgen.models.attention import Segments
from smidgen.models.fused_modules import activation_of
from smidgen.models.scores import intercepted
from smidgen.quant.linear import QuantizedLinear

# What a call may carry without changing the answer of a layer that keeps no cache.
_WITHOUT_EFFECT = {"attention_mask", "position_embeddings", "position_ids", "use_cache", "cache_position"}


class Products:
    """Linear layers of one input. Frozen ones can be joined: their weights lie in one matrix, multiplied at once."""

    def __init__(self, parent: Any, names: Sequence[str]):
        self.modules = [getattr(parent, name) for name in names]
        self.joined: Linear | None = None

    def outputs(self) -> int:
        return sum(module.out_features for module in self.modules)

    def join(self) -> None:
        if len(self.modules) == 1 or self._trained() or self._stored():
            return
        weights, biases = ([getattr(module, name) for module in self.modules] for name in ("weight", "bias"))
        given = [bias for bias in biases if bias is not None]
        if len(given) not in (0, len(weights)):
            return
        whole = [_side_by_side(tensors) for tensors in (weights, given) if tensors]
        self.joined = Linear(whole[0], whole[1] if given else None, ())

    def part(self) -> None:
        """Give each layer memory of its own again."""
        for module in self.modules if self.joined else ():
            for tensor in module.parameters(False):
                tensor.data = tensor.data.clone()
        self.joined = None

    def layers(self) -> tuple[Linear, ...]:
        """What is multiplied in one call."""
        layers = tuple(linear_of(module) for module in self.modules)
        whole = self._whole(layers)
        if whole is None:
            return layers
        updates, first = [], 0
        for layer in layers:
            updates += [update._replace(first=first) for update in layer.updates]
            first += outputs(layer.weight)
        return (whole._replace(updates=tuple(updates)),)

    def _whole(self, layers: tuple[Linear, ...]) -> Linear | None:
        """One layer with the weights of all; None where each is multiplied by itself."""
        if self._stored() and len(layers) > 1:
            stored = all(isinstance(layer.weight, Packed) for layer in layers)
            biases = [layer.bias for layer in layers if layer.bias is not None]
            if not stored or len(biases) not in (0, len(layers)) or len({layer.weight.dtype for layer in layers}) > 1:
                return None
            return Linear(Stack(tuple(layer.weight for layer in layers)), torch.cat(biases) if biases else None, ())
        return self.joined if self.joined is not None and not self._trained() and self._in_place() else None

    def _stored(self) -> bool:
        return any(isinstance(module, QuantizedLinear) for module in self.modules)

    def _trained(self) -> bool:
        return any(p.requires_grad for m in self.modules for p in m.parameters(False))

    def _in_place(self) -> bool:
        """Whether no layer was given another weight or bias since."""
        assert self.joined is not None
        sizes = [module.out_features for module in self.modules]
        for name, whole in (("weight", self.joined.weight), ("bias", self.joined.bias)):
            parts = [None] * len(sizes) if whole is None else whole.split(sizes)
            if any(_address(getattr(module, name)) != _address(part) for module, part in zip(self.modules, parts)):
                return False
        return True


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    whole = torch.cat([tensor.detach() for tensor in tensors])
    for tensor, part in zip(tensors, whole.split([len(tensor) for tensor in tensors])):
        tensor.data = part
    return whole


class FusedBlock:
    """The forward of one decoder layer, to be set on the instance; the layer's own runs where this cannot stand for it.

    Args:
        layer: a decoder layer whose norms are kernels already.
        scores: how each attention module was seen to attend.

    Raises:
        LookupError: the layer is built in another way.
    """

    def __init__(self, layer: Any, scores: Mapping[Any, Scores]):
        self.layer, self.own = layer, type(layer).forward
        found = _children(layer)
        attention, mlp = found.pop("self_attn"), found.pop("mlp")
        has_four = "pre_feedforward_layernorm" in found
        self.norm = _Norm(found.pop("input_layernorm"))
        after = _Norm(found.pop("post_attention_layernorm"))
        self.norm_after = after if has_four else None
        self.mlp_norm = _Norm(found.pop("pre_feedforward_layernorm")) if has_four else after
        self.mlp_norm_after = _Norm(found.pop("post_feedforward_layernorm")) if has_four else None

        inside = _children(attention)
        heads = ("qkv_proj",) if "qkv_proj" in inside else ("q_proj", "k_proj", "v_proj")
        self.heads, self.mix = Products(attention, heads), inside.pop("o_proj")
        self.head_norms = [_Norm(inside.pop(name)) if name in inside else None for name in ("q_norm", "k_norm")]
        self.scores, self.width = scores[attention], attention.head_dim
        self.kv_heads = (self.heads.outputs() - self.mix.in_features) // (2 * self.width)

        around = _children(mlp)
        gates = ("gate_up_proj",) if "gate_up_proj" in around else ("gate_proj", "up_proj")
        self.gates, self.mlp_mix = Products(mlp, gates), around.pop("down_proj")
        rest = {*found, *(inside.keys() - {*heads}), *(around.keys() - {*gates})}
        if len(rest) != 1:
            raise LookupError(f"parts of another kind: {', '.join(sorted(rest))}")
        act = around[rest.pop()]
        if (known := activation_of(act)) is None:
            raise LookupError(f"another activation: {type(act).__name__}")
        self.activation: Activation = known
        self.below = [module for child in layer.children() for module in child.modules()]
        self.products = {*self.heads.modules, self.mix, *self.gates.modules, self.mlp_mix}
        if self._parts() is None:
            raise LookupError("layers that are more than products")

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        parts = None if args or not self._may(kwargs) else self._parts()
        x = autocast(hidden_states)
        if parts is None or not all(takes(x, part) for part in parts):
            return self.own(self.layer, hidden_states, *args, **kwargs)
        frugal = self.layer.training and getattr(self.layer, "gradient_checkpointing", False)
        cos, sin = (self._angles(table, hidden_states) for table in kwargs["position_embeddings"])
        segments = kwargs["attention_mask"]
        where = Where(segments.offsets, cos, sin, segments.spread)
        between = add_attention(x, parts[0], where)
        return add_feed_forward(between, parts[1], frugal)

    def _may(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether nothing but the answer is asked for, the segments are known, and nobody listens inside the layer."""
        segments = kwargs.get("attention_mask")
        asked = any(
            value is not None and value is not False for name, value in kwargs.items() if name not in _WITHOUT_EFFECT
        )
        known = isinstance(segments, Segments) and segments.window == self.scores.window
        if asked or not known or "position_embeddings" not in kwargs:
            return False
        return not any(map(intercepted, self.below))

    def _parts(self) -> tuple[Attention, FeedForward] | None:
        """The halves with their tensors of this call; None where an adapter is more than a low-rank update."""
        adapted = any(hasattr(module, "adapters") for module in self.below if module not in self.products)
        if adapted or not all(map(is_low_rank, self.products)):
            return None
        query_norm, key_norm = (norm and norm() for norm in self.head_norms)
        attention = Attention(
            norm=self.norm(),
            inputs=self.heads.layers(),
            query_norm=query_norm,
            key_norm=key_norm,
            mix=linear_of(self.mix),
            norm_after=self.norm_after and self.norm_after(),
            kv_heads=self.kv_heads,
            head_width=self.width,
            scores=self.scores,
        )
        feed_forward = FeedForward(
            norm=self.mlp_norm(),
            inputs=self.gates.layers(),
            mix=linear_of(self.mlp_mix),
            norm_after=self.mlp_norm_after and self.mlp_norm_after(),
            activation=self.activation,
        )
        return autocasted(attention), autocasted(feed_forward)

    def _angles(self, table: Tensor, x: Tensor) -> Tensor:
        """(N, R) of transformers' (1 or B, T, 2 R), whose halves are equal."""
        half = table[..., : table.shape[-1] // 2].float()
        return half.expand(*x.shape[:2], -1).reshape(-1, half.shape[-1])

    def take_over(self) -> None:
        for products in (self.heads, self.gates):
            products.join()
        self.layer.__dict__["forward"] = self

    def give_back(self) -> None:
        del self.layer.__dict__["forward"]
        for products in (self.heads, self.gates):
            products.part()


def _children(module: nn.Module) -> dict[str, Any]:
    """The modules of which one is made, without those that do nothing."""
    return {
        name: child
        for name, child in module.named_children()
        if not (isinstance(child, nn.Identity) or (isinstance(child, nn.Dropout) and child.p == 0))
    }


class _Norm:
    """The norm of a module, with its weight of now."""

    def __init__(self, module: Any):
        if not hasattr(module, "how"):
            raise LookupError("a norm that is no kernel")
        self.module = module

    def __call__(self) -> Norm:
        return Norm(self.module.weight, None, *self.module.how)
