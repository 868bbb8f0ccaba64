"""smidgen: fine-tune a language model by training a smidgen of its parameters, with proof that it worked.

The public names are resolved on first use, so that importing the package loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smidgen.adapters.config import PeftConfig, TaskType
    from smidgen.adapters.methods.lora import LoraConfig
    from smidgen.models.fuse import fuse, unfuse
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

__version__ = "0.1.0"

_HOMES = {
    "LoraConfig": "smidgen.adapters.methods.lora",
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
    "LoraConfig",
    "PeftConfig",
    "PeftModel",
    "TaskType",
    "__version__",
    "fuse",
    "get_peft_model",
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
