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
LARGEST_RANK = 65_536  # wider than any layer: a larger one in a file is a mistake or an attack on the memory
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
    TaskType.SEQ_CLS: ("classifier", "score", "classification_head"),
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
    # Whose adapter files it has: "peft", or "smidgen" where that has no such method.
    files: ClassVar[str] = "peft"
    # Fields of the same method in adapter files that change the maths and are not offered here.
    refused: ClassVar[dict[str, Any]] = {}
    # Fields that adapter files of this method do not have elsewhere: they are written only where they are set.
    beyond_format: ClassVar[frozenset[str]] = frozenset()

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
        raise_all(UsageError, self.problems())

    def read_from_file(self) -> None:
        """Called on a configuration that was read from a file: what is beside it in the file is known."""

    def problems(self) -> list[str]:
        """A line for each value that cannot be meant: the field, what it must be, and what it is."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        fields = {
            field.name: value
            for field in dataclasses.fields(self)
            if field.init
            and ((value := getattr(self, field.name)) != field.default or field.name not in self.beyond_format)
        }
        fields |= {"peft_type": self.peft_type, "peft_version": FORMAT_VERSION, "auto_mapping": None}
        return {name: _as_json(value) for name, value in sorted(fields.items())}

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
        from smidgen.adapters.hub import as_fields

        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        path = adapter_folder(pretrained_model_name_or_path, **hub) / CONFIG_NAME
        fields = read_object(contained(path.parent, path.name, AdapterFileError), AdapterFileError)
        return cls.from_dict(as_fields(fields, str(path)) | kwargs, place=str(path))

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
        known = {field.name for field in dataclasses.fields(config_class) if field.init}
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
            config = build(config_class, values)
        except ValidationError as error:
            lines = [f"{place}: {dotted(where)}: {message}" for where, message in wrong_values(error, values)]
            raise AdapterFileError("\n".join(lines)) from error
        except UsageError as error:
            raise AdapterFileError(f"{place}: {error}") from error
        config.read_from_file()
        return config


@dataclass(kw_only=True)
class TargetConfig(PeftConfig):
    """What the configuration of every method holds that stands around single modules of the model.

    Args:
        target_modules: names that a module's path ends with, a regular expression for the whole path, or
            "all-linear": every linear layer but the head. None is what suits the method, mostly "all-linear".
        exclude_modules: names, or a regular expression, of target modules to leave out.
        layers_to_transform: adapt only these layers, by number.
        layers_pattern: how the numbered list of layers is called, where a model has several.
        fan_in_fan_out: accepted for files; how a layer stores its weight is seen from the layer.
    """

    # Fields of other values for some modules, by a regular expression for the end of a path: which field they replace.
    patterns: ClassVar[dict[str, str]] = {}

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            setattr(self, pattern, getattr(self, pattern) or {})
        super().__post_init__()

    def whole_numbers(self, field: str, pattern: str, most: int = LARGEST_RANK) -> list[str]:
        """A line for each value of a field and of its pattern that is no whole number from 1 to `most`."""
        lines = whole_number(field, getattr(self, field), most=most)
        for name, value in getattr(self, pattern).items():
            lines += whole_number(f"{pattern}['{name}']", value, most=most)
        return lines


@dataclass(kw_only=True)
class WeightConfig(TargetConfig):
    """What the configurations of most functions of the weight hold.

    Args:
        bias: train copies of biases too: "none", "<method>_only" (of the target modules) or "all".
        init_weights: start as the base model; False is a random start.
    """

    bias: str = "none"
    init_weights: bool = True

    def problems(self) -> list[str]:
        if self.bias in ("none", "all") or str(self.bias).endswith("_only"):
            return super().problems()
        only = f"{self.peft_type.lower()}_only"
        return [*super().problems(), f"bias: must be 'none', 'all' or '{only}', got {self.bias!r}"]


def _as_json(value: Any) -> Any:
    """Sets as sorted lists, parts of a configuration as mappings."""
    if isinstance(value, set):
        return sorted(value)
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def part_of(field: str, kind: type, value: Any) -> Any:
    """A part of a configuration that has fields of its own: a `kind`, made of a mapping as files and recipes hold it.

    None and an empty mapping are None. What `kind.elsewhere` names is left out.

    Raises:
        UsageError: it is no mapping, or a field is unknown or has a wrong value.
    """
    if isinstance(value, kind) or not value:
        return value or None
    if not isinstance(value, dict):
        raise UsageError(f"{field}: must be a mapping of fields to values, got {shown(repr(value))}")
    known = [known.name for known in dataclasses.fields(kind)]
    values = {name: value[name] for name in value if name not in getattr(kind, "elsewhere", ())}
    unknown = [name for name in values if name not in known]
    raise_all(UsageError, [f"{field}: no field '{shown(name)}'{did_you_mean(str(name), known)}" for name in unknown])
    try:
        return build(kind, values)
    except ValidationError as error:
        lines = [f"{field}.{dotted(where)}: {message}" for where, message in wrong_values(error, values)]
        raise UsageError("\n".join(lines)) from error


def whole_number(name: str, value: Any, least: int = 1, most: int = LARGEST_RANK) -> list[str]:
    """A line that says what `value` must be, where it is no whole number from `least` to `most`."""
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return []
    return [f"{name}: must be a whole number from {least} to {most}, got {value!r}"]


def fraction(name: str, value: Any) -> list[str]:
    """A line that says what `value` must be, where it is no share from 0 to below 1."""
    return [] if 0 <= value < 1 else [f"{name}: must be from 0 to below 1, got {value!r}"]
