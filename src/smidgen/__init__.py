"""smidgen: fine-tune a language model by training a smidgen of its parameters, with proof that it worked.

The public names are resolved on first use, so that importing the package loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smidgen.adapters.compose import Average, Fuse, Parallel, Stack
    from smidgen.adapters.config import PeftConfig, TaskType
    from smidgen.adapters.init.corda import CordaConfig
    from smidgen.adapters.init.eva import EvaConfig
    from smidgen.adapters.init.loftq import LoftQConfig
    from smidgen.adapters.init.lora_ga import LoraGAConfig
    from smidgen.adapters.init.measured import initialise_from
    from smidgen.adapters.methods.adalora import AdaLoraConfig
    from smidgen.adapters.methods.bitfit import BitFitConfig
    from smidgen.adapters.methods.boft import BOFTConfig
    from smidgen.adapters.methods.bottleneck import BottleneckConfig
    from smidgen.adapters.methods.fourierft import FourierFTConfig
    from smidgen.adapters.methods.fusion import FusionConfig
    from smidgen.adapters.methods.hra import HRAConfig
    from smidgen.adapters.methods.ia3 import IA3Config
    from smidgen.adapters.methods.ln_tuning import LNTuningConfig
    from smidgen.adapters.methods.loha import LoHaConfig
    from smidgen.adapters.methods.lokr import LoKrConfig
    from smidgen.adapters.methods.lora import LoraConfig
    from smidgen.adapters.methods.miss import MissConfig
    from smidgen.adapters.methods.oft import OFTConfig
    from smidgen.adapters.methods.p_tuning import PromptEncoderConfig
    from smidgen.adapters.methods.prefix_tuning import PrefixTuningConfig
    from smidgen.adapters.methods.prompt_tuning import PromptTuningConfig
    from smidgen.adapters.methods.randlora import RandLoraConfig
    from smidgen.adapters.methods.shira import ShiraConfig
    from smidgen.adapters.methods.trainable_tokens import TrainableTokensConfig
    from smidgen.adapters.methods.vera import VeraConfig
    from smidgen.evaluation.rewards import load_scorer
    from smidgen.models.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from smidgen.models.callbacks import AdapterCallback
    from smidgen.models.conversion import convert_to_lora, save_as_lora
    from smidgen.models.fuse import fuse, unfuse
    from smidgen.models.load import load_model
    from smidgen.models.peft_model import PeftModel, get_peft_model
    from smidgen.models.quantize import prepare_model_for_kbit_training

__version__ = "0.1.0"

_HOMES = {
    "AdaLoraConfig": "smidgen.adapters.methods.adalora",
    "AdapterCallback": "smidgen.models.callbacks",
    "Average": "smidgen.adapters.compose",
    "BOFTConfig": "smidgen.adapters.methods.boft",
    "BitFitConfig": "smidgen.adapters.methods.bitfit",
    "BottleneckConfig": "smidgen.adapters.methods.bottleneck",
    "CordaConfig": "smidgen.adapters.init.corda",
    "EvaConfig": "smidgen.adapters.init.eva",
    "FourierFTConfig": "smidgen.adapters.methods.fourierft",
    "Fuse": "smidgen.adapters.compose",
    "FusionConfig": "smidgen.adapters.methods.fusion",
    "HRAConfig": "smidgen.adapters.methods.hra",
    "IA3Config": "smidgen.adapters.methods.ia3",
    "LNTuningConfig": "smidgen.adapters.methods.ln_tuning",
    "LoHaConfig": "smidgen.adapters.methods.loha",
    "LoKrConfig": "smidgen.adapters.methods.lokr",
    "LoftQConfig": "smidgen.adapters.init.loftq",
    "LoraConfig": "smidgen.adapters.methods.lora",
    "LoraGAConfig": "smidgen.adapters.init.lora_ga",
    "MissConfig": "smidgen.adapters.methods.miss",
    "OFTConfig": "smidgen.adapters.methods.oft",
    "RandLoraConfig": "smidgen.adapters.methods.randlora",
    "ShiraConfig": "smidgen.adapters.methods.shira",
    "Stack": "smidgen.adapters.compose",
    "TrainableTokensConfig": "smidgen.adapters.methods.trainable_tokens",
    "VeraConfig": "smidgen.adapters.methods.vera",
    "Parallel": "smidgen.adapters.compose",
    "PeftConfig": "smidgen.adapters.config",
    "PrefixTuningConfig": "smidgen.adapters.methods.prefix_tuning",
    "PromptEncoderConfig": "smidgen.adapters.methods.p_tuning",
    "PromptTuningConfig": "smidgen.adapters.methods.prompt_tuning",
    "TaskType": "smidgen.adapters.config",
    "AutoPeftModel": "smidgen.models.auto",
    "AutoPeftModelForCausalLM": "smidgen.models.auto",
    "AutoPeftModelForFeatureExtraction": "smidgen.models.auto",
    "AutoPeftModelForQuestionAnswering": "smidgen.models.auto",
    "AutoPeftModelForSeq2SeqLM": "smidgen.models.auto",
    "AutoPeftModelForSequenceClassification": "smidgen.models.auto",
    "AutoPeftModelForTokenClassification": "smidgen.models.auto",
    "PeftModel": "smidgen.models.peft_model",
    "convert_to_lora": "smidgen.models.conversion",
    "fuse": "smidgen.models.fuse",
    "get_peft_model": "smidgen.models.peft_model",
    "initialise_from": "smidgen.adapters.init.measured",
    "load_model": "smidgen.models.load",
    "load_scorer": "smidgen.evaluation.rewards",
    "prepare_model_for_kbit_training": "smidgen.models.quantize",
    "save_as_lora": "smidgen.models.conversion",
    "unfuse": "smidgen.models.fuse",
}

__all__ = [  # the keys of _HOMES, written out because type checkers read this list and cannot compute it
    "AdaLoraConfig",
    "AdapterCallback",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "Average",
    "BOFTConfig",
    "BitFitConfig",
    "BottleneckConfig",
    "CordaConfig",
    "EvaConfig",
    "FourierFTConfig",
    "Fuse",
    "FusionConfig",
    "HRAConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "MissConfig",
    "OFTConfig",
    "Parallel",
    "PeftConfig",
    "PeftModel",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "RandLoraConfig",
    "ShiraConfig",
    "Stack",
    "TaskType",
    "TrainableTokensConfig",
    "VeraConfig",
    "__version__",
    "convert_to_lora",
    "fuse",
    "get_peft_model",
    "initialise_from",
    "load_model",
    "load_scorer",
    "prepare_model_for_kbit_training",
    "save_as_lora",
    "unfuse",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'smidgen' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
