"""The configurations under which every law is tested. A method that joins the registry adds its cases here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.models.quantize import quantization_config, quantize_model
from tests.conftest import tiny_gpt2, tiny_llama, toy

QV = ["q_proj", "v_proj"]


def tied() -> nn.Module:
    return tiny_llama(tied=True)


def biased() -> nn.Module:
    return tiny_llama(bias=True)


def grouped() -> nn.Module:
    """A `Grouped`, the same one each time. Frozen: torch computes a convolution that takes gradients by other means."""
    torch.manual_seed(0)
    return Grouped().eval().requires_grad_(False)


class Grouped(nn.Module):
    """Tokens in, numbers out, through a convolution whose channels are in two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.linear = nn.Linear(8, 6)
        self.conv = nn.Conv1d(6, 4, 3, padding=1, groups=2)
        self.head = nn.Linear(4, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(torch.tanh(self.linear(self.embed(tokens))).transpose(1, 2))
        return self.head(torch.tanh(x.transpose(1, 2)))


# name: (model, options of LoraConfig). Every option that is about the maths, on every kind of layer.
LORA_CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "default": (tiny_llama, {"target_modules": QV}),
    "all-linear": (tiny_llama, {"target_modules": "all-linear", "r": 4, "lora_alpha": 16}),
    "regex": (tiny_llama, {"target_modules": r".*layers\.1.*(q|k)_proj"}),
    "rslora": (tiny_llama, {"target_modules": QV, "use_rslora": True, "lora_alpha": 3}),
    "dora": (tiny_llama, {"target_modules": QV, "use_dora": True}),
    "dora bias": (biased, {"target_modules": QV, "use_dora": True}),
    "patterns": (
        tiny_llama,
        {
            "target_modules": [*QV, "up_proj"],
            "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 5},
            "alpha_pattern": {"v_proj": 32},
        },
    ),
    "exclude": (tiny_llama, {"target_modules": "all-linear", "exclude_modules": ["down_proj", "o_proj"]}),
    "layers": (tiny_llama, {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "bias lora_only": (biased, {"target_modules": QV, "bias": "lora_only"}),
    "bias all": (biased, {"target_modules": QV, "bias": "all"}),
    "lora_bias": (biased, {"target_modules": QV, "lora_bias": True}),
    "modules_to_save": (tiny_llama, {"target_modules": QV, "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "modules_to_save container": (biased, {"target_modules": QV, "modules_to_save": ["mlp"]}),
    "modules_to_save tied": (
        tied,
        {"target_modules": QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "modules_to_save tied apart": (
        tied,
        {"target_modules": QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": False},
    ),
    "tokens": (tiny_llama, {"target_modules": QV, "trainable_token_indices": [5, 1, 7]}),
    "tokens tied": (tied, {"target_modules": QV, "trainable_token_indices": [5, 1]}),
    "tokens by name": (
        tiny_llama,
        {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [3], "lm_head": [2, 4]}},
    ),
    "embedding": (tiny_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding dora": (tiny_llama, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "embedding tied": (tied, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "embedding tied apart": (tied, {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": False}),
    "head": (tiny_llama, {"target_modules": ["lm_head"]}),
    "gaussian": (tiny_llama, {"target_modules": QV, "init_lora_weights": "gaussian"}),
    "random": (tiny_llama, {"target_modules": QV, "init_lora_weights": False}),
    "pissa": (tiny_llama, {"target_modules": QV, "init_lora_weights": "pissa"}),
    "pissa niter": (tiny_llama, {"target_modules": QV, "init_lora_weights": "pissa_niter_8"}),
    "pissa dora": (tiny_llama, {"target_modules": QV, "init_lora_weights": "pissa", "use_dora": True}),
    "olora": (tiny_llama, {"target_modules": QV, "init_lora_weights": "olora"}),
    "orthogonal": (tiny_llama, {"target_modules": QV, "init_lora_weights": "orthogonal"}),
    "Conv1D": (tiny_gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "Conv1D dora": (tiny_gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "Conv1D pissa": (tiny_gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": "pissa"}),
    "convolutions": (toy, {"target_modules": ["conv1", "conv2", "conv3", "linear", "embed"]}),
    "convolutions dora": (toy, {"target_modules": ["conv1", "conv2", "conv3"], "use_dora": True}),
    "convolutions lora_bias": (toy, {"target_modules": ["conv1", "conv3"], "lora_bias": True}),
}

Case = tuple[Callable[[], nn.Module], dict[str, Any]]

FEED = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
KERNELS = ["conv1", "conv2", "linear"]
# The options of targets and of what is trained beside them, which every function of single layers has.
BESIDE: dict[str, Case] = {
    "all-linear": (tiny_llama, {"target_modules": "all-linear"}),
    "layers": (tiny_llama, {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "modules_to_save": (biased, {"target_modules": QV, "modules_to_save": ["lm_head", "norm"]}),
    "bias all": (biased, {"target_modules": QV, "bias": "all"}),
    "random": (tiny_llama, {"target_modules": QV, "init_weights": False}),
    "Conv1D": (tiny_gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}
UNSAVED, SMALL = {"save_projection": False}, {"randlora_alpha": 1}
PATTERNS = {"rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 5}, "alpha_pattern": {"v_proj": 32}}


def beside(*left_out: str, **options: Any) -> dict[str, Case]:
    """The cases of `BESIDE` but those `left_out`, with `options` in all."""
    return {name: (build, own | options) for name, (build, own) in BESIDE.items() if name not in left_out}


# method of the registry: its cases. `full` and `freeze` train the base itself and are no adapters.
CASES: dict[str, dict[str, Case]] = {
    "lora": LORA_CASES,
    "ia3": {
        "default": (tiny_llama, {}),
        "outputs": (biased, {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}),
        "feed-forward": (biased, FEED),
        "regex": (tiny_llama, {"target_modules": r".*(v|down)_proj", "feedforward_modules": r".*down_proj"}),
        "random": (tiny_llama, FEED | {"init_ia3_weights": False}),
        "Conv1D": (tiny_gpt2, {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
        "kernels": (toy, {"target_modules": ["conv2", "conv3"], "feedforward_modules": ["conv3"]}),
        "groups": (grouped, {"target_modules": ["conv", "linear"], "feedforward_modules": ["conv"]}),
    },
    "loha": {
        **beside("bias all", r=4),
        "patterns": (tiny_llama, {"target_modules": [*QV, "up_proj"], "alpha": 16} | PATTERNS),
        "kernels": (toy, {"target_modules": KERNELS, "r": 3}),
        "effective kernels": (toy, {"target_modules": KERNELS, "r": 3, "use_effective_conv2d": True}),
        "groups": (grouped, {"target_modules": ["conv"], "r": 2}),
    },
    "lokr": {
        **beside("bias all", r=4),
        "patterns": (tiny_llama, {"target_modules": [*QV, "up_proj"], "alpha": 16} | PATTERNS),
        "both": (tiny_llama, {"target_modules": QV, "r": 1, "decompose_both": True}),
        "factor": (tiny_llama, {"target_modules": QV, "r": 2, "decompose_factor": 2}),
        "lycoris": (tiny_llama, {"target_modules": QV, "r": 1, "init_weights": "lycoris"}),
        "kernels": (toy, {"target_modules": KERNELS, "r": 1}),
        "whole kernels": (toy, {"target_modules": KERNELS, "r": 8}),
        "effective kernels": (toy, {"target_modules": ["conv2", "linear"], "r": 1, "use_effective_conv2d": True}),
        "one side": (toy, {"target_modules": ["conv1"], "r": 1, "use_effective_conv2d": True}),
        "groups": (grouped, {"target_modules": ["conv"], "r": 1}),
    },
    "vera": {
        **beside(r=8, d_initial=0.5),
        "drawn again": (tiny_llama, {"target_modules": ["q_proj", "up_proj"], "r": 8} | UNSAVED),
        "key": (tiny_llama, {"target_modules": QV, "r": 8, "projection_prng_key": 7}),
    },
    "ln_tuning": {
        "default": (tiny_llama, {}),
        "names": (tiny_llama, {"target_modules": ["input_layernorm"], "modules_to_save": ["lm_head"]}),
        "regex": (tiny_llama, {"target_modules": r".*layers\.1.*layernorm"}),
        "LayerNorm": (tiny_gpt2, {}),
        "module": (toy, {"target_modules": ["norm"]}),
        "any layer": (tiny_llama, {"target_modules": ["q_proj", "norm"]}),
    },
    "bitfit": {
        "default": (biased, {}),
        "names": (biased, {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1}),
        "GPT-2": (tiny_gpt2, {}),
        "kinds": (toy, {"exclude_modules": ["norm"]}),
    },
    "oft": {
        **beside(oft_block_size=8),
        "blocks": (tiny_llama, {"target_modules": QV, "r": 4, "oft_block_size": 0}),
        "nearest divisor": (tiny_llama, {"target_modules": QV, "oft_block_size": 5}),
        "inverse": (tiny_llama, {"target_modules": QV, "oft_block_size": 8, "use_cayley_neumann": False}),
        "two terms": (tiny_llama, {"target_modules": QV, "oft_block_size": 8, "num_cayley_neumann_terms": 2}),
        "three terms": (tiny_llama, {"target_modules": QV, "oft_block_size": 8, "num_cayley_neumann_terms": 3}),
        "shared": (tiny_llama, {"target_modules": QV, "oft_block_size": 8, "block_share": True}),
        "constrained": (tiny_llama, {"target_modules": "all-linear", "oft_block_size": 8, "coft": True, "eps": 0.8}),
        "embedding": (tiny_llama, {"target_modules": ["embed_tokens", "q_proj"], "oft_block_size": 8}),
        "kernels": (toy, {"target_modules": ["conv2", "conv3", "linear"], "oft_block_size": 2}),
    },
    "hra": {
        **beside(r=4),
        "odd": (tiny_llama, {"target_modules": QV, "r": 3}),
        "orthogonal": (tiny_llama, {"target_modules": QV, "r": 2, "apply_GS": True}),
        "kernels": (toy, {"target_modules": ["conv3", "linear"], "r": 2}),
    },
    "boft": {
        **beside(boft_block_size=4),
        "blocks": (biased, {"target_modules": QV, "boft_block_size": 0, "boft_block_num": 4}),
        "butterfly": (biased, {"target_modules": "all-linear", "boft_block_size": 4, "boft_n_butterfly_factor": 3}),
        "kernels": (toy, {"target_modules": ["conv2", "conv3", "linear"], "boft_block_size": 2}),
    },
    "fourierft": {
        **beside("random", n_frequency=50, scaling=20.0),
        "zero": (tiny_llama, {"target_modules": QV, "n_frequency": 200, "init_weights": True}),
        "seed": (tiny_llama, {"target_modules": QV, "n_frequency": 50, "random_loc_seed": 3, "scaling": 40.0}),
        "patterns": (tiny_llama, {"target_modules": QV, "n_frequency": 50, "n_frequency_pattern": {"q_proj": 20}}),
    },
    "randlora": {
        **beside(r=5, randlora_alpha=0.5),
        "drawn again": (tiny_llama, {"target_modules": ["q_proj", "up_proj"], "r": 8} | UNSAVED | SMALL),
        "sparse": (tiny_llama, {"target_modules": ["q_proj", "down_proj"], "r": 8, "sparse": True} | SMALL),
        "very sparse": (tiny_llama, {"target_modules": QV, "r": 8, "very_sparse": True} | SMALL),
    },
    "miss": {
        **beside(r=8),
        "remainder": (tiny_llama, {"target_modules": QV, "r": 7}),
        "bat": (tiny_llama, {"target_modules": QV, "r": 8, "init_weights": "bat"}),
        "mini": (tiny_llama, {"target_modules": QV, "r": 8, "init_weights": "mini", "mini_r": 4}),
    },
    "shira": {
        **beside("bias all", r=2),
        "seed": (tiny_llama, {"target_modules": QV, "r": 2, "random_seed": 7}),
        "magnitude": (tiny_llama, {"target_modules": QV, "r": 2, "mask_type": "magnitude"}),
    },
    "trainable_tokens": {
        "default": (tiny_llama, {"token_indices": [5, 1, 7]}),
        "tied": (tied, {"token_indices": [5, 1]}),
        "head": (tiny_llama, {"token_indices": [3, 4], "target_modules": ["embed_tokens", "lm_head"]}),
        "random": (tiny_llama, {"token_indices": [5, 7], "init_weights": False}),
    },
}

BASES = ("plain", "nf4", "int8")  # how the linear layers of the base are stored
# The cases that every run tries on each base; the slow tests try all that have linear layers.
QUICK = {
    "plain": {method: list(cases)[: None if method == "lora" else 1] for method, cases in CASES.items()},
    "nf4": {method: list(cases)[:1] for method, cases in CASES.items()},
    "int8": {method: ["default"] if method == "lora" else [] for method in CASES},
}
QUICK["nf4"]["lora"] += ["all-linear", "patterns", "dora bias", "bias all", "tokens tied", "Conv1D dora"]


def on_base(build: Callable[[], Any], base: str) -> Callable[[], Any]:
    """`build`, with the linear layers of the model stored as `base` says."""

    def stored() -> Any:
        model = build()
        quantize_model(model, quantization_config(base, dtype=torch.float32))
        return model

    return build if base == "plain" else stored


# What trains the stored weights themselves is refused by name.
REFUSED_ON_STORED_BASES = {("lora", "modules_to_save container"): "modules_to_save: '.*' is stored in 4 or 8 bits"}

# (method, case): the reason why a law does not hold there. "*": for every case of the method.
NOT_EQUAL_TO_PEFT = {
    ("lora", "pissa niter"): "peft draws other random numbers at each load, so no file of its own loads the same",
    ("bitfit", "*"): "peft has no BitFit",
    ("boft", "butterfly"): "peft makes butterfly factors only with a GPU; a test of its own computes what it would",
    **{
        (method, "Conv1D"): "peft refuses transformers' Conv1D for this method"
        for method in ("loha", "lokr", "oft", "hra", "boft", "miss", "shira")
    },
    ("shira", "magnitude"): "peft has the random mask only",
    ("lokr", "one side"): "peft's product of such a kernel fails",
    ("ia3", "groups"): "peft has no one-dimensional kernels here",
    **{(method, "kernels"): "peft takes square kernels only; they have a test" for method in ("oft", "hra", "boft")},
    ("shira", "layers"): "peft has no layers_to_transform here",
}
_RANDOM = "init_weights=False asks for a random start"
NOT_IDENTITY_AT_START = {
    **{(method, case): _RANDOM for method, cases in CASES.items() for case in cases if case == "random"},
    **{("fourierft", case): "a random spectrum is the paper's start" for case in CASES["fourierft"] if case != "zero"},
    ("hra", "odd"): "an odd number of reflections is never the identity",
    ("hra", "orthogonal"): "a chain of orthogonal reflections is never the identity",
}
