"""The configurations under which every law is tested. A method that joins the registry adds its cases here."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smidgen
from smidgen.models.quantize import quantization_config, quantize_model
from smidgen.registry import METHODS
from tests.conftest import perturb, tiny_bert, tiny_gpt2, tiny_llama, tokens, toy

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


EVEN = dataclasses.asdict(smidgen.EvaConfig(rho=1.0))  # no layer gets more rank than another
Case = tuple[Callable[[], nn.Module], dict[str, Any]]

# name: (model, options of LoraConfig). Every option that is about the maths, on every kind of layer.
LORA_CASES: dict[str, Case] = {
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
    "eva": (tiny_llama, {"target_modules": QV, "r": 4, "init_lora_weights": "eva", "eva_config": EVEN}),
    "eva ranks": (tiny_llama, {"target_modules": "all-linear", "r": 4, "init_lora_weights": "eva"}),
    "corda": (tiny_llama, {"target_modules": QV, "init_lora_weights": "corda"}),
    "corda dora": (
        tiny_llama,
        {
            "target_modules": [*QV, "embed_tokens"],
            "init_lora_weights": "corda",
            "corda_config": {"corda_method": "kpm"},
            "use_dora": True,
        },
    ),
    "lora_ga": (
        tiny_llama,
        {"target_modules": QV, "init_lora_weights": "lora_ga", "use_rslora": True, "alpha_pattern": {"v_proj": 3}},
    ),
    "loftq": (tiny_llama, {"target_modules": "all-linear", "r": 4, "init_lora_weights": "loftq"}),
    "Conv1D": (tiny_gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "Conv1D corda": (tiny_gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": "corda"}),
    "Conv1D dora": (tiny_gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "Conv1D pissa": (tiny_gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": "pissa"}),
    "convolutions": (toy, {"target_modules": ["conv1", "conv2", "conv3", "linear", "embed"]}),
    "convolutions dora": (toy, {"target_modules": ["conv1", "conv2", "conv3"], "use_dora": True}),
    "convolutions lora_bias": (toy, {"target_modules": ["conv1", "conv3"], "lora_bias": True}),
}

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
LM = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
ADALORA = {"init_r": 6, "target_r": 4, "total_step": 10, "lora_alpha": 32}


def beside(*left_out: str, **options: Any) -> dict[str, Case]:
    """The cases of `BESIDE` but those `left_out`, with `options` in all."""
    return {name: (build, own | options) for name, (build, own) in BESIDE.items() if name not in left_out}


_FOLDER = tempfile.TemporaryDirectory()  # of adapters that others are made of, until the process ends


def saved(build: Callable[[], Any], **configs: Any) -> list[str]:
    """The folders of adapters of these configurations, moved as training would."""
    folders = []
    for number, (name, config) in enumerate(configs.items()):
        torch.manual_seed(number)
        model = smidgen.get_peft_model(build(), config, name)
        perturb(model, seed=number)
        home = Path(_FOLDER.name) / build.__name__
        model.save_pretrained(home)
        folders.append(str(home / name))
    return folders


_PFEIFFER, _HOULSBY = ({"kind": kind, "reduction_factor": 4} for kind in ("pfeiffer", "houlsby"))
VO = ["v_proj", "o_proj"]

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
    "prompt_tuning": {
        "default": (tiny_llama, LM),
        "vocabulary": (tiny_llama, {**LM, "prompt_tuning_init": "SAMPLE_VOCAB"}),
        "GPT-2": (tiny_gpt2, LM),
    },
    "p_tuning": {
        "MLP": (tiny_llama, LM),
        "MLP narrow": (tiny_gpt2, {**LM, "encoder_hidden_size": 12}),
        "LSTM": (tiny_llama, {**LM, "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12}),
    },
    "prefix_tuning": {
        "default": (tiny_llama, LM),
        "projection": (tiny_llama, {**LM, "prefix_projection": True, "encoder_hidden_size": 12}),
        "GPT-2": (tiny_gpt2, LM),
        "zero": (tiny_llama, {**LM, "init_weights": "zero"}),
    },
    "p_tuning_v2": {"default": (tiny_llama, LM)},
    "adalora": {
        "default": (tiny_llama, {**ADALORA, "target_modules": QV}),
        "all-linear": (tiny_llama, {**ADALORA, "target_modules": "all-linear"}),
        "Conv1D": (tiny_gpt2, {**ADALORA, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
        "convolution": (toy, {**ADALORA, "target_modules": ["conv2", "linear"]}),
        "modules_to_save": (tiny_llama, {**ADALORA, "target_modules": QV, "modules_to_save": ["norm"]}),
    },
    "bottleneck": {
        "houlsby": (tiny_llama, {"kind": "houlsby", "reduction_factor": 4}),
        "pfeiffer": (tiny_llama, {"kind": "pfeiffer", "reduction_factor": 4, "leave_out": [0]}),
        "parallel": (tiny_llama, {"kind": "parallel", "non_linearity": "gelu"}),
        "GPT-2": (tiny_gpt2, {"kind": "pfeiffer", "reduction_factor": 4}),
        "BERT houlsby": (tiny_bert, {"kind": "houlsby", "reduction_factor": 4, "task_type": "TOKEN_CLS"}),
        "BERT pfeiffer": (tiny_bert, {"kind": "pfeiffer", "reduction_factor": 4}),
        "BERT parallel": (tiny_bert, {"kind": "parallel"}),
    },
    "fusion": {
        "bottleneck": (
            tiny_llama,
            {
                "adapters": saved(
                    tiny_llama,
                    pfeiffer=smidgen.BottleneckConfig(**_PFEIFFER),
                    houlsby=smidgen.BottleneckConfig(**_HOULSBY),
                    parallel=smidgen.BottleneckConfig(kind="parallel"),
                )
            },
        ),
        "lora": (
            tiny_llama,
            {
                "adapters": saved(
                    tiny_llama,
                    plain=smidgen.LoraConfig(r=4, target_modules=VO),
                    dora=smidgen.LoraConfig(r=4, target_modules=[*VO, "embed_tokens"], use_dora=True),
                    ia3=smidgen.IA3Config(target_modules=VO, feedforward_modules=["o_proj"]),
                ),
                "regularization": 0.0,
            },
        ),
        "BERT": (
            tiny_bert,
            {
                "adapters": saved(
                    tiny_bert,
                    one=smidgen.BottleneckConfig(**_PFEIFFER),
                    two=smidgen.BottleneckConfig(**_PFEIFFER),
                ),
                "task_type": "TOKEN_CLS",
            },
        ),
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
QUICK["nf4"]["lora"] += ["corda", "loftq"]


def on_base(build: Callable[[], Any], base: str) -> Callable[[], Any]:
    """`build`, with the linear layers of the model stored as `base` says."""

    def stored() -> Any:
        model = build()
        quantize_model(model, quantization_config(base, dtype=torch.float32))
        return model

    return build if base == "plain" else stored


def batches() -> list[dict[str, Tensor]]:
    """What a start that needs data is given: two batches of rows with labels."""
    made = [tokens(), tokens(rows=5, length=10)]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in made]


def configuration(method: str, case: str, base: str = "plain") -> Any:
    """A new configuration of a case for a model on that base; a start that needs data has been computed."""
    build, options = CASES[method][case]
    config = METHODS[method].load().config_class(**copy.deepcopy(options))
    if getattr(config, "is_measured", False):
        weights = {name: tensor.detach() for name, tensor in build().state_dict().items()}
        bits = {"nf4": 4, "int8": 8}.get(base)
        if bits and config.loftq_config:
            config.loftq_config.loftq_bits = bits
        smidgen.initialise_from(on_base(build, base)(), config, batches(), weights, say=lambda line: None)
    return config


# What trains the stored weights themselves, or needs their gradients, is refused by name.
REFUSED_ON_STORED_BASES = {
    ("lora", "modules_to_save container"): "modules_to_save: '.*' is stored in 4 or 8 bits",
    ("bottleneck", "BERT houlsby"): "modules_to_save: 'classifier' is stored in 4 or 8 bits",
    ("fusion", "BERT"): "modules_to_save: 'classifier' is stored in 4 or 8 bits",
    ("ln_tuning", "any layer"): "q_proj' is a QuantizedLinear with nothing to train",
    ("lora", "lora_ga"): "'lora_ga' needs gradients of weights, and those stored in 4 or 8 bits take none",
}
REFUSED_ON_PLAIN_BASES = {("lora", "loftq"): "'loftq' makes up for a base in 4 or 8 bits"}

# (method, case): the reason why a law does not hold there. "*": for every case of the method.
NOT_EQUAL_TO_PEFT = {
    ("lora", "pissa niter"): "peft draws other random numbers at each load, so no file of its own loads the same",
    ("bitfit", "*"): "peft has no such method",
    ("bottleneck", "*"): "peft has no such method",
    ("fusion", "*"): "peft has no such method",
    **{
        ("lora", case): "peft's file leaves out what the start took from the base; the numbers have tests of their own"
        for case in ("corda", "corda dora", "Conv1D corda", "lora_ga")
    },
    ("lora", "eva ranks"): "peft gives ranks in a second step; a test of its own compares them",
    ("lora", "loftq"): "peft stores a plain base anew, on a GPU alone",
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
PROMPTS = ("prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2")
_RANDOM = "init_weights=False asks for a random start"
NOT_IDENTITY_AT_START = {
    **{(method, case): _RANDOM for method, cases in CASES.items() for case in cases if case == "random"},
    **{("fourierft", case): "a random spectrum is the paper's start" for case in CASES["fourierft"] if case != "zero"},
    ("lora", "loftq"): "the start is nearer to the weights before they were stored than the base is",
    ("hra", "odd"): "an odd number of reflections is never the identity",
    ("hra", "orthogonal"): "a chain of orthogonal reflections is never the identity",
    **{(method, "*"): "a prompt is there from the start; no prompt answers as none does" for method in PROMPTS},
    ("fusion", "*"): "the adapters that it chooses among are trained already",
}
NOT_MERGEABLE = {
    **{(method, "*"): "virtual tokens are no function of a weight" for method in PROMPTS},
    ("bottleneck", "*"): "a network with an activation is no function of a weight",
    ("fusion", "*"): "what it chooses depends on the token",
}
# Rows of one batch cannot each have their own there; that is refused by name.
NOT_ROW_BY_ROW: dict[tuple[str, str], str] = {}
_ENCODER = "peft drops the network that computes the prompt; our file holds it too, so that it can be trained further"
MORE_KEYS_THAN_PEFT = {("p_tuning", "*"): _ENCODER, ("prefix_tuning", "projection"): _ENCODER}


def excepted(key: tuple[str, str], exceptions: dict[tuple[str, str], str]) -> str | None:
    """The reason why a law does not hold for a case, or None."""
    return exceptions.get(key) or exceptions.get((key[0], "*"))


ALL = [
    (method, case, "plain")
    for method, cases in CASES.items()
    for case in cases
    if (method, case) not in REFUSED_ON_PLAIN_BASES
]
STORED = [
    (method, case, base)
    for base in BASES[1:]
    for method, cases in CASES.items()
    for case, (build, _) in cases.items()
    if build not in (toy, grouped) and (method, case) not in REFUSED_ON_STORED_BASES
]


def quick(key: tuple[str, str, str]) -> bool:
    method, case, base = key
    return case in QUICK[base][method]


def marked(key: tuple[str, str, str]) -> Any:
    return pytest.param(key, id="-".join(key), marks=[pytest.mark.slow] * (not quick(key)))
