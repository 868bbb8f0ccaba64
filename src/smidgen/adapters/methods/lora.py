"""LoRA: a low-rank update beside each target weight (https://arxiv.org/abs/2106.09685).

Also rank-stabilised scaling (rsLoRA, https://arxiv.org/abs/2312.03732) and weight decomposition (DoRA,
https://arxiv.org/abs/2402.09353).

Legend: the weight is a matrix (out, in), R the rank, s the scaling.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from smidgen.adapters.base import Inner, Place, WeightAdapter
from smidgen.adapters.config import TargetConfig, fraction
from smidgen.adapters.init import Start
from smidgen.adapters.layers import ConvLayer, EmbeddingLayer, LinearLayer, TransposedLinearLayer
from smidgen.adapters.targets import ALL_LINEAR, check_patterns, find_targets, pattern_value
from smidgen.adapters.trained import plan_trained, with_mirrors
from smidgen.errors import MergeError, TargetError, raise_all
from smidgen.kernels.lora import LowRank, as_one, lora_linear
from smidgen.registry import LORA_INITS, lookup


@dataclass(kw_only=True)
class LoraConfig(TargetConfig):
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
        init_lora_weights: how the factors start: True, False (random), "gaussian", "pissa",
            "pissa_niter_[n]" (a faster approximation), "olora", "orthogonal". The last four apply to linear layers;
            others start as with True.
        trainable_token_indices: rows of the input embedding to train in full: ids, or ids for each embedding's name.
        ensure_weight_tying: layers that share one weight go on sharing it when it is adapted.
    """

    peft_type: ClassVar[str] = "LORA"
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
    refused: ClassVar[dict[str, Any]] = {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "corda_config": None,
        "eva_config": None,
        "kasa_config": None,
        "layer_replication": None,
        "loftq_config": {},
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "monteclora_config": None,
        "qalora_group_size": 16,
        "runtime_config": {"ephemeral_gpu_offload": False},
        "target_parameters": None,
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
    init_lora_weights: bool | str = True
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.init_name()

    def problems(self) -> list[str]:
        problems = super().problems() + self.whole_numbers("r", "rank_pattern")
        problems += fraction("lora_dropout", self.lora_dropout)
        if self.bias not in ("none", "all", "lora_only"):
            problems.append(f"bias: must be 'none', 'all' or 'lora_only', got {self.bias!r}")
        return problems

    def init_name(self) -> str:
        """The name of the start in the registry.

        Raises:
            UsageError: there is no such start.
        """
        chosen = self.init_lora_weights
        name = chosen if isinstance(chosen, str) else "default" if chosen else "random"
        name = re.sub(r"^pissa_niter_\d{1,3}$", "pissa", name)
        return lookup(LORA_INITS, name, "init_lora_weights").name

    def init_options(self) -> dict[str, int]:
        """What the start is told beside the weight: PiSSA's number of iterations in "pissa_niter_16"."""
        steps = re.fullmatch(r"pissa_niter_(\d+)", str(self.init_lora_weights))
        return {"niter": int(steps[1])} if steps else {}

    def scaling(self, r: int, alpha: float) -> float:
        """s, what the product of the factors is multiplied by."""
        return alpha / (math.sqrt(r) if self.use_rslora else r)


@dataclass(frozen=True)
class LoraPlace:
    """The configuration of one place, its patterns resolved."""

    config: LoraConfig
    r: int
    scaling: float


class Factor(nn.Module):
    """One factor of the update: a weight, and a bias where the update has one."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)


class Lora(WeightAdapter):
    """y = x W^T + s B A dropout(x): A (R, in) and B (out, R) are trained."""

    config_class = LoraConfig

    lora_A: Factor
    lora_B: Factor
    lora_embedding_A: nn.Parameter
    lora_embedding_B: nn.Parameter
    lora_magnitude_vector: Any  # a parameter of (out,) numbers, or None without DoRA
    start_A: Any  # a tensor, or None where the start takes nothing from the weight
    start_B: Any

    @classmethod
    def plan(cls, model: nn.Module, config: LoraConfig) -> Iterator[Place]:
        if config.target_modules is None:
            config.target_modules = ALL_LINEAR
        targets = find_targets(model, config)
        problems = check_patterns(config.rank_pattern, targets, "rank_pattern")
        problems += check_patterns(config.alpha_pattern, targets, "alpha_pattern")
        raise_all(TargetError, problems)
        places = []
        for path in targets:
            r = pattern_value(config.rank_pattern, path, config.r)
            alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
            places.append(Place(path, cls, LoraPlace(config, r, config.scaling(r, alpha))))
        places += plan_trained(model, config, targets)
        yield from with_mirrors(model, places, config.ensure_weight_tying)

    def __init__(self, base: Any, config: LoraPlace, shared: Any = None):
        super().__init__(base, config)
        options, layer = config.config, self.layer
        self.r, self.scaling = config.r, config.scaling
        self.groups = getattr(base, "groups", 1)
        self.dropout = nn.Dropout(options.lora_dropout)
        self._check(base, options)
        a, b, offset = self._start(base, options)
        bias = torch.zeros(b.shape[0], device=b.device) if options.lora_bias else None
        if isinstance(layer, EmbeddingLayer):
            self.lora_embedding_A, self.lora_embedding_B = nn.Parameter(a), nn.Parameter(b)
        elif isinstance(layer, ConvLayer):
            kernel = base.weight.shape[2:]
            b = b[:, : self.r // self.groups].reshape(b.shape[0], -1, *[1] * len(kernel)).contiguous()
            self.lora_A, self.lora_B = Factor(a.unflatten(1, (-1, *kernel))), Factor(b, bias)
        else:
            self.lora_A, self.lora_B = Factor(a), Factor(b, bias)
        # Starts that take a part of the weight: the base answers without it, and stays as it is.
        self.register_buffer("start_A", a.clone() if offset else None, persistent=False)
        self.register_buffer("start_B", b.clone() if offset else None, persistent=False)
        self.bias = None
        if options.bias != "none" and getattr(base, "bias", None) is not None:
            self.bias = nn.Parameter(base.bias.detach().float().clone())
        self.lora_magnitude_vector = None
        if options.use_dora:
            _, norm = self._direction(layer.matrix(base.weight.detach()))
            shape = (1, -1, *[1] * (base.weight.dim() - 2)) if isinstance(layer, ConvLayer) else (-1,)
            self.lora_magnitude_vector = nn.Parameter(norm.float().view(shape).contiguous())

    def _check(self, base: Any, options: LoraConfig) -> None:
        if self.r % self.groups:
            raise TargetError(f"r: {self.r} is no multiple of the convolution's {self.groups} groups")
        if self.groups > 1 and options.use_dora:
            raise TargetError(f"use_dora: a convolution with {self.groups} groups has no single weight to decompose")
        if self.layer.device.type == "meta" and (options.use_dora or options.init_name() in ("pissa", "olora")):
            raise TargetError("use_dora, pissa and olora read the weight, which is offloaded: load it into memory")
        if options.lora_bias and isinstance(self.layer, EmbeddingLayer):
            raise TargetError("lora_bias: an embedding has no bias")

    def _start(self, base: Any, options: LoraConfig) -> tuple[Tensor, Tensor, bool]:
        """A and B at the start as matrices, and whether the base is to answer without their product."""
        name, linear = options.init_name(), isinstance(self.layer, LinearLayer)
        out_features, in_features = self.layer.shape
        device = self.layer.device
        if device.type == "meta":  # offloaded: the start needs no more than its shape and where it will be computed
            device = torch.device(getattr(getattr(base, "_hf_hook", None), "execution_device", "cpu"))

        def read() -> Tensor:
            matrix = self.layer.matrix(base.weight.detach()).float()
            return matrix.repeat(1, self.groups)  # A mixes all input channels, which a grouped weight does not hold

        start = Start((out_features, in_features * self.groups), device, read)
        name = name if linear or name in ("random", "gaussian") else "default"
        more = options.init_options() if name == "pissa" else {}
        a, b, offset = LORA_INITS[name].load()(start, self.r, self.scaling, **more)
        if isinstance(self.layer, EmbeddingLayer) and name != "random":
            # As the reference does, the side of the vocabulary starts at zero, so that rare tokens move first.
            a, b = torch.zeros_like(a), torch.randn_like(b)
        return a, b, offset

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (out, R) as matrices."""
        if isinstance(self.layer, EmbeddingLayer):
            return self.lora_embedding_A, self.lora_embedding_B
        a, b = self.lora_A.weight, self.lora_B.weight
        if isinstance(self.layer, ConvLayer):
            a, b = a.flatten(1), b.flatten(1)
            b = torch.block_diag(*b.chunk(self.groups)) if self.groups > 1 else b
        return a, b

    def _update_bias(self) -> Tensor | None:
        return None if isinstance(self.layer, EmbeddingLayer) else self.lora_B.bias

    def _direction(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The updated weight (out, in) and the norm (out,) of each of its rows; `weight` is the layer's matrix."""
        a, b = self.factors()
        updated = weight + self.scaling * (b @ a)
        if self.start_A is not None:
            updated = updated - self.scaling * (self.start_B @ self.start_A)
        return updated, updated.norm(dim=1)

    def _magnitude(self, weight: Tensor) -> Tensor:
        """DoRA's factor (out,) for each output. The norm takes no gradient (DoRA, section 4.3)."""
        return self.lora_magnitude_vector.flatten() / self._direction(weight)[1].detach()

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.groups > 1:
            raise MergeError(
                f"an update that mixes the channels of {self.groups} groups does not fit the grouped weight"
            )
        matrix = self.layer.matrix(weight)
        merged, _ = self._direction(matrix)
        bias = bias if self.bias is None else self.bias
        update = self._update_bias()
        if self.lora_magnitude_vector is not None:
            magnitude = self._magnitude(matrix)
            merged = magnitude[:, None] * merged
            update = None if update is None else magnitude * update
        if update is not None:
            bias = self.scaling * update + (0 if bias is None else bias)
        return self.layer.store(merged), bias

    def forward(self, inner: Inner, x: Tensor) -> Tensor:
        layer = self.layer
        if (weight := inner.plain_weight) is not None and self.is_low_rank() and as_one(x, weight):
            return lora_linear(x, weight, inner.bias, [self.low_rank()])
        y = inner(x) if self.bias is None else inner.call_with({"bias": self.bias}, x)
        if self.start_A is not None:
            y = y - self._low_rank(x, y.dtype, self.start_A, self.start_B)
        dropped = self.dropout(x) if x.is_floating_point() else x
        update = self._low_rank(dropped, y.dtype, *self.factors(), bias=self._update_bias())
        if self.lora_magnitude_vector is None:
            return y + update
        weight = layer.matrix(inner.weight)
        magnitude = layer.channels(self._magnitude(weight)).to(y.dtype)
        if dropped is x:
            bias = inner.bias if self.bias is None else self.bias
            base = y if bias is None else y - layer.channels(bias.to(y.dtype))
        else:
            base = layer.linear(dropped.to(weight.dtype), weight)
            if self.start_A is not None:
                base = base - self._low_rank(dropped, y.dtype, self.start_A, self.start_B)
        return y + (magnitude - 1) * base + magnitude * update

    def is_low_rank(self) -> bool:
        parts = (self.start_A, self.lora_magnitude_vector, self.bias)
        rows = isinstance(self.layer, LinearLayer) and not isinstance(self.layer, TransposedLinearLayer)
        return rows and self.lora_B.bias is None and all(part is None for part in parts)

    def low_rank(self) -> LowRank:
        p = self.dropout.p if self.training else 0.0
        # The mask follows from the seed, which is drawn as a mask would be: a resumed run draws the same.
        seed = int(torch.randint(2**62, ())) if p else 0
        return LowRank(*self.factors(), self.scaling, p, seed)

    def _low_rank(self, x: Tensor, dtype: torch.dtype, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """s (B A x + bias), computed in the base's dtype: what is narrow is cast, not the activations."""
        x = x.to(dtype) if x.is_floating_point() else x
        b, bias = self.scaling * b, None if bias is None else (self.scaling * bias).to(dtype)
        return self.layer.pointwise(self.layer.linear(x, a.to(dtype)), b.to(dtype), bias)

    def mirror_tensors(self) -> dict[str, Tensor]:
        """The same update as a tied layer of the other kind holds it: factors swapped and transposed."""
        a, b = self.factors()
        names = ("lora_A.weight", "lora_B.weight")
        if not isinstance(self.layer, EmbeddingLayer):
            names = ("lora_embedding_A", "lora_embedding_B")
        return {names[0]: b.T, names[1]: a.T}

    def file_key(self, path: str, name: str) -> str:
        return super().file_key(path, "base_layer.bias" if name == "bias" else name)
