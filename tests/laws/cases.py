"""The configurations under which every law is tested. A method that joins the registry adds its cases here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tests.conftest import tiny_gpt2, tiny_llama, toy

QV = ["q_proj", "v_proj"]


def tied() -> nn.Module:
    return tiny_llama(tied=True)


def biased() -> nn.Module:
    return tiny_llama(bias=True)


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

# method of the registry: its cases. `full` and `freeze` train the base itself and are no adapters.
CASES = {"lora": LORA_CASES}

# (method, case): the reason why a law does not hold there.
NOT_EQUAL_TO_PEFT = {
    "pissa niter": "peft draws other random numbers at each load, so no file of its own loads the same"
}
NOT_IDENTITY_AT_START = {("lora", "random"): "init_lora_weights=False asks for a random start"}
