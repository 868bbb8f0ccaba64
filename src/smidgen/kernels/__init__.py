"""Operations of language models, each declared once in plain PyTorch, with a faster native equal on CPUs."""

from smidgen.kernels.attention import Spread, attention, spread_out
from smidgen.kernels.cross_entropy import linear_cross_entropy, linear_logprob
from smidgen.kernels.dropout import dropout
from smidgen.kernels.gated import geglu, swiglu
from smidgen.kernels.lora import LowRank, lora_linear
from smidgen.kernels.native import available, chosen, forget, instruction_set
from smidgen.kernels.norms import add_rms_norm, layer_norm, rms_norm
from smidgen.kernels.rope import rope

__all__ = [
    "LowRank",
    "Spread",
    "add_rms_norm",
    "attention",
    "available",
    "chosen",
    "dropout",
    "forget",
    "geglu",
    "instruction_set",
    "layer_norm",
    "linear_cross_entropy",
    "linear_logprob",
    "lora_linear",
    "rms_norm",
    "rope",
    "spread_out",
    "swiglu",
]
