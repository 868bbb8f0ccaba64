"""smidgen: fine-tune a language model by training a smidgen of its parameters, with proof that it worked.

The public names are resolved on first use, so that importing the package loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smidgen.adapters.config import PeftConfig, TaskType
    from smidgen.adapters.methods.bitfit import BitFitConfig
    from smidgen.adapters.methods.boft import BOFTConfig
    from smidgen.adapters.methods.fourierft import FourierFTConfig
    from smidgen.adapters.methods.hra import HRAConfig
    from smidgen.adapters.methods.ia3 import IA3Config
    from smidgen.adapters.methods.ln_tuning import LNTuningConfig
    from smidgen.adapters.methods.loha import LoHaConfig
    from smidgen.adapters.methods.lokr import LoKrConfig
    from smidgen.adapters.methods.lora import LoraConfig
    from smidgen.adapters.methods.miss import MissConfig
    from smidgen.adapters.methods.oft import OFTConfig
    from smidgen.adapters.methods.randlora import RandLoraConfig
    from smidgen.adapters.methods.shira import ShiraConfig
    from smidgen.adapters.methods.trainable_tokens import TrainableTokensConfig
    from smidgen.adapters.methods.vera import VeraConfig
    from smidgen.models.fuse import fuse, unfuse
    from smidgen.models.load import load_model
    from smidgen.models.peft_model import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
        PeftModel,
        get_peft_model,
    )
    from smidgen.models.quantize import prepare_model_for_kbit_training

__version__ = "0.1.0"

_HOMES = {
    "BOFTConfig": "smidgen.adapters.methods.boft",
    "BitFitConfig": "smidgen.adapters.methods.bitfit",
    "FourierFTConfig": "smidgen.adapters.methods.fourierft",
    "HRAConfig": "smidgen.adapters.methods.hra",
    "IA3Config": "smidgen.adapters.methods.ia3",
    "LNTuningConfig": "smidgen.adapters.methods.ln_tuning",
    "LoHaConfig": "smidgen.adapters.methods.loha",
    "LoKrConfig": "smidgen.adapters.methods.lokr",
    "LoraConfig": "smidgen.adapters.methods.lora",
    "MissConfig": "smidgen.adapters.methods.miss",
    "OFTConfig": "smidgen.adapters.methods.oft",
    "RandLoraConfig": "smidgen.adapters.methods.randlora",
    "ShiraConfig": "smidgen.adapters.methods.shira",
    "TrainableTokensConfig": "smidgen.adapters.methods.trainable_tokens",
    "VeraConfig": "smidgen.adapters.methods.vera",
    "PeftConfig": "smidgen.adapters.config",
    "TaskType": "smidgen.adapters.config",
    "AutoPeftModel": "smidgen.models.peft_model",
    "AutoPeftModelForCausalLM": "smidgen.models.peft_model",
    "AutoPeftModelForFeatureExtraction": "smidgen.models.peft_model",
    "AutoPeftModelForQuestionAnswering": "smidgen.models.peft_model",
    "AutoPeftModelForSeq2SeqLM": "smidgen.models.peft_model",
    "AutoPeftModelForSequenceClassification": "smidgen.models.peft_model",
    "AutoPeftModelForTokenClassification": "smidgen.models.peft_model",
    "PeftModel": "smidgen.models.peft_model",
    "fuse": "smidgen.models.fuse",
    "get_peft_model": "smidgen.models.peft_model",
    "load_model": "smidgen.models.load",
    "prepare_model_for_kbit_training": "smidgen.models.quantize",
    "unfuse": "smidgen.models.fuse",
}

__all__ = [  # the keys of _HOMES, written out because type checkers read this list and cannot compute it
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BOFTConfig",
    "BitFitConfig",
    "FourierFTConfig",
    "HRAConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "MissConfig",
    "OFTConfig",
    "PeftConfig",
    "PeftModel",
    "RandLoraConfig",
    "ShiraConfig",
    "TaskType",
    "TrainableTokensConfig",
    "VeraConfig",
    "__version__",
    "fuse",
    "get_peft_model",
    "load_model",
    "prepare_model_for_kbit_training",
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
