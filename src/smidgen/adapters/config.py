"""The configuration of an adapter: the fields of ``adapter_config.json``, Hugging Face's names unchanged.

A configuration is data. Reading one never imports code and never names a class.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import ConfigDict, ValidationError

from smidgen.checking import build, wrong_values
from smidgen.drafts import dotted
from smidgen.errors import AdapterFileError, UsageError, did_you_mean, raise_all
from smidgen.foreign import contained, read_object, shown
from smidgen.registry import METHODS

# Of the names or characters of one field, and of its patterns: more is no adapter that somebody trained.
_LARGEST_FIELD, _MOST_PATTERNS = 10_000, 1000

CONFIG_NAME = "adapter_config.json"
# Adapter files say which release of the format they follow.
FORMAT_VERSION = "0.21.2"


class TaskType(enum.StrEnum):
    """What a model is trained to do; Hugging Face's names."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


# New heads that a task adds to a model: they are always trained and always saved.
TASK_HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


@dataclass(kw_only=True)
class PeftConfig:
    """What every method's configuration holds.

    Args:
        task_type: what the model is trained to do; heads of classification tasks are trained and saved with it.
        base_model_name_or_path: the base model, filled in when the adapter is attached.
        revision: the revision of the base model on the hub.
        inference_mode: the adapter is frozen.
        modules_to_save: names of modules that get a fully trained copy, saved with the adapter.
    """

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)

    peft_type: ClassVar[str] = ""
    # Fields of the same method in adapter files that change the maths and are not offered here.
    refused: ClassVar[dict[str, Any]] = {}

    task_type: TaskType | str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        if self.task_type is not None:
            names = [task.value for task in TaskType]
            if self.task_type not in names:
                hint = did_you_mean(str(self.task_type), names)
                raise AdapterFileError(f"task_type: no '{self.task_type}'{hint} There are: {', '.join(names)}.")
            self.task_type = TaskType(self.task_type)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields |= {"peft_type": self.peft_type, "peft_version": FORMAT_VERSION, "auto_mapping": None}
        return {name: sorted(value) if isinstance(value, set) else value for name, value in sorted(fields.items())}

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``adapter_config.json`` into the folder."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Read the configuration of an adapter folder; called on `PeftConfig` it answers the method's own class.

        Args:
            pretrained_model_name_or_path: the adapter's folder, or its id on the hub.
            kwargs: fields to set instead of what the file says, and `revision`, `cache_dir`, `token` for the hub.

        Raises:
            AdapterFileError: there is no such file, it is not JSON, or it asks for what smidgen does not do.
        """
        from smidgen.adapters.files import HUB_OPTIONS, adapter_folder

        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        path = adapter_folder(pretrained_model_name_or_path, **hub) / CONFIG_NAME
        fields = read_object(contained(path.parent, path.name, AdapterFileError), AdapterFileError)
        return cls.from_dict(fields | kwargs, place=str(path))

    @classmethod
    def from_dict(cls, fields: dict[str, Any], place: str = CONFIG_NAME) -> Self:
        """Build a configuration from the fields of an adapter file; `place` is named in errors.

        Fields that only matter to other tools are left out; a field that would change the answers and that
        smidgen does not have is refused, unless it is switched off.

        Raises:
            AdapterFileError: a field is unknown to the method, or asks for what smidgen does not do.
        """
        peft_type = shown(fields.get("peft_type", "")).upper()
        config_classes = [entry.load().config_class for entry in METHODS.values()]
        classes = {known.peft_type: known for known in config_classes if issubclass(known, PeftConfig)}
        if peft_type not in classes:
            raise AdapterFileError(f"{place}: peft_type '{peft_type}' is none of {', '.join(classes)}")
        config_class = classes[peft_type]
        if not issubclass(config_class, cls):
            raise AdapterFileError(f"{place}: peft_type '{peft_type}' is not a {cls.__name__}")
        known = {field.name for field in dataclasses.fields(config_class)}
        ignored = {"peft_type", "peft_version", "auto_mapping"}
        problems = []
        for name in fields.keys() - known - ignored:
            off = config_class.refused.get(name, ...)
            if off is ...:
                problems.append(f"{place}: no field '{shown(name)}'{did_you_mean(name, known)}")
            elif fields[name] not in (off, None, False, {}, []):
                problems.append(f"{place}: {name}={shown(repr(fields[name]))} is not supported")
        raise_all(AdapterFileError, sorted(problems))
        values = {name: fields[name] for name in known & fields.keys() if fields[name] is not None}
        for name, value in values.items():
            most = _MOST_PATTERNS if isinstance(value, dict) else _LARGEST_FIELD
            if isinstance(value, list | dict | str) and len(value) > most:
                raise AdapterFileError(f"{place}: {name}: {len(value):,} entries, more than {most:,}")
        try:
            return build(config_class, values)
        except ValidationError as error:
            lines = [f"{place}: {dotted(where)}: {message}" for where, message in wrong_values(error, values)]
            raise AdapterFileError("\n".join(lines)) from error
        except UsageError as error:
            raise AdapterFileError(f"{place}: {error}") from error
