"""The Auto classes people type: the base that an adapter folder names, with the adapter on top."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smidgen.adapters.config import PeftConfig, TaskType
from smidgen.adapters.files import adapter_folder, saved_labels
from smidgen.errors import AdapterFileError
from smidgen.models.peft_model import PeftModel
from smidgen.models.tasks import AUTO_CLASSES, label_fields, remember_new_heads


class _AutoPeftModel:
    """Loads an adapter together with the base model that its configuration names."""

    task_type: TaskType

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load the base model (`kwargs` go to its `from_pretrained`) and attach the adapter.

        Raises:
            AdapterFileError: the folder is no adapter's, names no base model, or does not fit it.
        """
        folder = adapter_folder(pretrained_model_name_or_path, **({} if revision is None else {"revision": revision}))
        config = config or PeftConfig.from_pretrained(folder)
        if not config.base_model_name_or_path:
            raise AdapterFileError(
                f"{folder}: base_model_name_or_path is empty; load the base, then PeftModel.from_pretrained"
            )
        named = {} if kwargs.keys() & {"config", "num_labels", "id2label"} else label_fields(saved_labels(folder))
        revision_of_base = {"revision": config.revision} if config.revision else {}
        task = cls._task(config)
        base, report = AUTO_CLASSES[task].from_pretrained(
            config.base_model_name_or_path, **(named | revision_of_base | kwargs | {"output_loading_info": True})
        )
        if task != TaskType.FEATURE_EXTRACTION:
            remember_new_heads(base, report["missing_keys"])
        return PeftModel.from_pretrained(base, folder, adapter_name, is_trainable)

    @classmethod
    def _task(cls, config: PeftConfig) -> TaskType:
        return cls.task_type


class AutoPeftModel(_AutoPeftModel):
    """Loads the base by the adapter's task type."""

    @classmethod
    def _task(cls, config: PeftConfig) -> TaskType:
        return TaskType(config.task_type or TaskType.FEATURE_EXTRACTION)


class AutoPeftModelForCausalLM(_AutoPeftModel):
    """An adapter over a causal language model."""

    task_type = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(_AutoPeftModel):
    """An adapter over an encoder-decoder language model."""

    task_type = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(_AutoPeftModel):
    """An adapter over a sequence classifier."""

    task_type = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(_AutoPeftModel):
    """An adapter over a token classifier."""

    task_type = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(_AutoPeftModel):
    """An adapter over an extractive question answering model."""

    task_type = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(_AutoPeftModel):
    """An adapter over a model that answers hidden states."""

    task_type = TaskType.FEATURE_EXTRACTION
