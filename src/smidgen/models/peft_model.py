"""The names people type: `get_peft_model`, `PeftModel`, the Auto classes, and what an adapted model can do.

`get_peft_model` answers the same object, adapted in place: it is still a ``LlamaForCausalLM`` with `generate` and has
the methods of `AdaptedModel` on top. Where transformers has a method of the same name, the signature here is peft's.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers.utils import SAFE_WEIGHTS_NAME

from smidgen.adapters import attach
from smidgen.adapters.attach import BASE, MadeInPlace, State, class_with, class_without
from smidgen.adapters.base import Adapter, in_adapter
from smidgen.adapters.config import PeftConfig
from smidgen.adapters.files import (
    HUB_OPTIONS,
    KEY_PREFIX,
    WEIGHTS_NAME,
    adapter_folder,
    adapter_state_dict,
    base_embeddings,
    load_tensors,
    read_adapter,
    save_adapter,
)
from smidgen.errors import AdapterFileError, UsageError, did_you_mean
from smidgen.models.fingerprint import fingerprint, same_base
from smidgen.models.quantize import parameter_count, take_over_bitsandbytes, unquantize
from smidgen.models.vocabulary import give_back, row_count, settle, untouched_rows, vocabulary_of
from smidgen.models.vocabulary_files import fit_vocabulary, metadata_of
from smidgen.registry import METHODS

# The mixin is made into a class only together with a model's own, whose methods it calls.
_Model = transformers.PreTrainedModel if TYPE_CHECKING else object


class AdaptedModel(MadeInPlace, _Model):
    """Put in front of the class of a model that has adapters; a mixin, never made by itself."""

    _adapters: State

    # --- calls ---------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Call the model; `adapter_names` gives each row of the batch its own adapter ("__base__": none)."""
        with self._rows(adapter_names):
            return super().__call__(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """As transformers' `generate`; `adapter_names` as in a call."""
        if adapter_names is not None and kwargs.get("num_beams", 1) > 1:
            raise UsageError("adapter_names: rows with their own adapters cannot be combined with beam search")
        with self._rows(adapter_names):
            return super().generate(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    @contextmanager
    def _rows(self, names: list[str] | None) -> Iterator[None]:
        state = self._adapters
        if names is None:
            yield
            return
        self._check_names([name for name in names if name != BASE])
        if getattr(self, "is_gradient_checkpointing", False) and self.training and torch.is_grad_enabled():
            raise UsageError("adapter_names: not together with gradient checkpointing, which calls layers again later")
        if attach.merged_names(self):
            raise UsageError("adapter_names: adapters are merged into the weights; call unmerge_adapter() first")
        whole = {
            type(a).__name__ for name in set(names) - {BASE} for _, a in attach.adapters_of(self, name) if not a.per_row
        }
        if whole:
            raise UsageError(f"adapter_names: {', '.join(sorted(whole))} works on a whole batch, not row by row")
        before, state.rows = state.rows, list(names)
        try:
            yield
        finally:
            state.rows = before

    # --- what there is --------------------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configuration of each adapter, by name."""
        return self._adapters.configs

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that answer now, lowest first."""
        return list(self._adapters.active)

    @property
    def active_adapter(self) -> str:
        """The first active adapter."""
        return self._adapters.active[0]

    def get_base_model(self) -> Any:
        """The model itself: adapters are attached in place."""
        return self

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many numbers are trained, and how many there are in all, adapters included."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad), parameter_count(self)

    def print_trainable_parameters(self) -> None:
        """Print how much of the model is trained, in one line."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    # --- adding, choosing, removing -------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Attach another adapter; it does not answer before `set_adapter`.

        Args:
            low_cpu_mem_usage: there for peft's callers; an adapter is small.
            autocast_adapter_dtype: keep the adapter in fp32 over a 16-bit base; False: in the base's dtype.

        Raises:
            TargetError: what the configuration asks for is not in the model; nothing was changed.
            UsageError: the name is taken or cannot be part of a parameter's name.
        """
        if not isinstance(peft_config, PeftConfig) and hasattr(adapter_name, "to_dict"):
            raise UsageError("add_adapter takes the name first, then the configuration: add_adapter(name, config)")
        method = _method_of(peft_config)
        places = list(method.plan(self, peft_config))
        attach.attach(self, self._adapters, adapter_name, places, method, peft_config)
        if not autocast_adapter_dtype:
            for _, adapter in attach.adapters_of(self, adapter_name):
                adapter.to(self.dtype)
        peft_config.base_model_name_or_path = peft_config.base_model_name_or_path or _base_name(self)
        self._set_trainable(adapter_name, False)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Let only these adapters answer, and train them unless `inference_mode`."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_names(names)
        for name in self._adapters.configs:
            self._set_trainable(name, name in names and not inference_mode)
        self._adapters.active = names

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off the model, and rows of the vocabulary that were added for it alone."""
        self._check_names([adapter_name])
        if adapter_name in attach.merged_names(self):
            raise UsageError(f"adapter '{adapter_name}' is merged into the weights; call unmerge_adapter() first")
        attach.detach(self, self._adapters, adapter_name)
        give_back(self)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model's own answers inside the block, to the bit."""
        with attach.switched_off(self, self._adapters):
            yield

    def _check_names(self, names: list[str]) -> None:
        there = self._adapters.configs
        for name in names:
            if name not in there:
                raise UsageError(
                    f"adapter: no '{name}'{did_you_mean(name, there)} There are: {', '.join(there) or 'none'}."
                )

    def _set_trainable(self, name: str, trainable: bool) -> None:
        for _, adapter in attach.adapters_of(self, name):
            adapter.requires_grad_(trainable)

    # --- merging --------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = True) -> None:
        """Fold adapters (default: the active ones) into the weights. `safe_merge` or not, it is always checked.

        Raises:
            MergeError: a method cannot be merged, or a merged tensor is not finite; the model is as before.
        """
        names = adapter_names or self.active_adapters
        self._check_names(names)
        attach.merge(self, names)

    def unmerge_adapter(self) -> None:
        """Put the weights back, exact to the bit."""
        attach.unmerge(self)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = True, adapter_names: list[str] | None = None
    ) -> Any:
        """Merge, then take all adapters off: answers a plain model that needs no smidgen.

        `progressbar` and `safe_merge` are there for peft's callers: nothing is shown, and merging is always checked.
        A quantised base becomes a plain one too: its weights as they were computed with, and the update.
        Where an adapter changed only one of several layers that shared a weight, they are untied and a warning says
        how much larger the saved model is.

        Raises:
            MergeError: as `merge_adapter`.
        """
        self.merge_adapter(adapter_names)
        for _, module in list(attach.adapted_modules(self)):
            module._replaced.clear()
        settle(self)
        self.unload()
        unquantize(self)
        return self

    def unload(self) -> Any:
        """Take all adapters off; the weights stay as they are now, without rows that were added for the adapters."""
        for name in list(self._adapters.configs):
            attach.detach(self, self._adapters, name)
        give_back(self)
        for attribute in ("_adapters", "_hf_peft_config_loaded"):
            delattr(self, attribute)
        self.__class__ = class_without(type(self), AdaptedModel)
        _follow_ties(self)
        return self

    # --- files ----------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the adapters, not the base: "default" into the folder, others into a folder of their name below it.

        Args:
            selected_adapters: which ones; default all.
            save_embedding_layers: whether files of adapted embeddings carry the base's too ("auto": as peft does).
            state_dict: take the values from this state dict of the whole model.

        Raises:
            UsageError: a pickle was asked for, or an option that is not there.
            AdapterFileError: a tensor holds values that are not finite.
        """
        _refuse(kwargs, "save_pretrained")
        if not safe_serialization:
            raise UsageError("safe_serialization=False asks for a pickle; smidgen writes safetensors only")
        if not is_main_process:
            return
        names = selected_adapters or list(self._adapters.configs)
        self._check_names(names)
        merged = attach.merged_names(self)
        for name in names:
            config = self._adapters.configs[name]
            tensors = adapter_state_dict(self, name, state_dict)
            if save_embedding_layers and not merged:
                grown = row_count(self) > vocabulary_of(self).base_rows
                tensors |= base_embeddings(self, name, config, grown)
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            trained, config.inference_mode = config.inference_mode, True
            try:
                save_adapter(folder, tensors, config, metadata_of(self, config) | self._base_marks(name))
            finally:
                config.inference_mode = trained
            if re.fullmatch(r"checkpoint-\d+", folder.name):
                # transformers' Trainer resumes from, and ends with, what it finds under this name.
                shutil.copyfile(folder / WEIGHTS_NAME, folder / SAFE_WEIGHTS_NAME)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """As torch's; a state dict under the keys of an adapter file goes into the first active adapter.

        Raises:
            AdapterFileError: the keys or shapes of such a file do not fit.
        """
        if state_dict and all(key.startswith(KEY_PREFIX) for key in state_dict):
            load_tensors(self, self.active_adapter, dict(state_dict), "state_dict")
            return _IncompatibleKeys([], [])
        return super().load_state_dict(state_dict, strict, assign)

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        force: bool = False,
        **kwargs: Any,
    ) -> None:
        """Attach the adapter of a folder under a name, or load its tensors into the adapter of that name.

        Args:
            is_trainable: go on training it.
            force: load it onto another base than it was trained on.

        Raises:
            AdapterFileError: the files do not fit the model, or were trained on another base.
        """
        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        kwargs.pop("low_cpu_mem_usage", None)  # an adapter is small
        _refuse(kwargs, "load_adapter")
        folder = adapter_folder(model_id, **hub)
        tensors, metadata = read_adapter(folder)
        new = adapter_name not in self._adapters.configs
        config = PeftConfig.from_pretrained(folder, inference_mode=not is_trainable)
        try:
            tensors = fit_vocabulary(self, config, tensors, metadata, str(folder))
            self._check_base(folder, metadata, force)
            if new:
                self.add_adapter(adapter_name, config, autocast_adapter_dtype=autocast_adapter_dtype)
            load_tensors(self, adapter_name, tensors, str(folder))
        except UsageError:
            if new and adapter_name in self._adapters.configs:
                attach.detach(self, self._adapters, adapter_name)
            give_back(self)
            raise
        self._set_trainable(adapter_name, is_trainable)

    def _base_marks(self, name: str) -> dict[str, Any]:
        """What the file of the adapter `name` says about its base; nothing while adapters are merged into it."""
        if attach.merged_names(self):
            return {}
        marks: dict[str, Any] = {"base_fingerprint": fingerprint(self)}
        rows = untouched_rows(self, name)
        if any(count < vocabulary_of(self).base_rows for count in rows.values()):
            marks |= {"untouched_rows": rows, "untouched_fingerprint": fingerprint(self, rows)}
        return marks

    def _check_base(self, folder: Path, metadata: dict[str, Any], force: bool) -> None:
        trained_on = metadata.get("base_fingerprint")
        if trained_on is None or force or attach.merged_names(self):
            return
        here = fingerprint(self)
        rows = metadata.get("untouched_rows")
        if rows and same_base(fingerprint(self, rows), metadata["untouched_fingerprint"]):
            return
        if not same_base(here, trained_on):
            raise AdapterFileError(
                f"{folder}: trained on base {trained_on[:12]}, this is {here[:12]}: other weights or another shape. "
                "Load the base it was trained on (--base), or load it all the same (--force, force=True)"
            )


class _PeftModelType(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, AdaptedModel)


class PeftModel(metaclass=_PeftModelType):
    """``isinstance(model, PeftModel)`` holds for adapted models; `from_pretrained` attaches a saved adapter."""

    @staticmethod
    def from_pretrained(
        model: Any,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """Attach the adapter of a folder (or of the hub) to `model` and let it answer.

        Args:
            config: taken instead of the folder's own.

        Raises:
            AdapterFileError: as `AdaptedModel.load_adapter`; the model is as before.
        """
        fresh = not isinstance(model, AdaptedModel)
        adapted = _adaptable(model)
        try:
            if config is not None:
                adapted.add_adapter(adapter_name, config)
            adapted.load_adapter(model_id, adapter_name, is_trainable, **kwargs)
        except Exception:
            if fresh:
                adapted.unload()
            raise
        if fresh:
            _freeze_base(model)
        adapted.set_adapter(adapter_name, inference_mode=not is_trainable)
        return adapted if is_trainable else adapted.eval()


def get_peft_model(
    model: Any,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Attach a new adapter to `model`, in place, freeze the rest, and answer the same object.

    Args:
        autocast_adapter_dtype, low_cpu_mem_usage: as for `AdaptedModel.add_adapter`.
        revision: the base model's on the hub, written into the adapter's configuration.

    Raises:
        TargetError: what the configuration asks for is not in the model; nothing was changed.
    """
    fresh = not isinstance(model, AdaptedModel)
    adapted = _adaptable(model)
    peft_config.revision = revision or peft_config.revision
    try:
        adapted.add_adapter(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)
    except Exception:
        if fresh:
            adapted.unload()
        raise
    if fresh:
        _freeze_base(model)
    adapted.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
    return adapted


def _adaptable(model: Any) -> Any:
    if not isinstance(model, AdaptedModel):
        take_over_bitsandbytes(model)
        model.__class__ = class_with(AdaptedModel, type(model))
        # transformers' Trainer asks for this mark where the base is quantised.
        model.__dict__.update(_adapters=State(), _hf_peft_config_loaded=True)
    return model


def _refuse(options: dict[str, Any], function: str) -> None:
    """Options that nothing here would read are an error, not silence."""
    if options:
        raise UsageError(f"{function}: no option {', '.join(map(repr, options))}")


def _freeze_base(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not in_adapter(name):
            parameter.requires_grad_(False)


def _method_of(config: PeftConfig) -> Any:
    for entry in METHODS.values():
        method = entry.load()
        if method.config_class is type(config) and issubclass(method, Adapter):
            return method
    raise UsageError(f"{type(config).__name__} is no configuration of an adapter; take LoraConfig, for example")


def _base_name(model: Any) -> str | None:
    return getattr(model, "name_or_path", None) or None


def _follow_ties(model: Any) -> None:
    """After merging: say it, and let the configuration say it, where input and output embeddings are untied now."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(model, "get_output_embeddings"):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and embedding is not None and head.weight is not embedding.weight:
        config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
        size = head.weight.numel() * head.weight.element_size() / 1e6
        warnings.warn(f"the embeddings are untied by merging: the saved model is {size:.1f} MB larger", stacklevel=3)


class _AutoPeftModel:
    """Loads an adapter together with the base model that its configuration names."""

    task_type: str | None = None
    base_class: Any = None

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
        base = cls._base_class(config).from_pretrained(
            config.base_model_name_or_path, **({"revision": config.revision} | kwargs if config.revision else kwargs)
        )
        return PeftModel.from_pretrained(base, folder, adapter_name, is_trainable)

    @classmethod
    def _base_class(cls, config: PeftConfig) -> Any:
        return cls.base_class


class AutoPeftModel(_AutoPeftModel):
    """Loads the base by the adapter's task type."""

    @classmethod
    def _base_class(cls, config: PeftConfig) -> Any:
        by_task = {auto.task_type: auto.base_class for auto in _AutoPeftModel.__subclasses__() if auto.base_class}
        return by_task.get(config.task_type, transformers.AutoModel)


class AutoPeftModelForCausalLM(_AutoPeftModel):
    """An adapter over a causal language model."""

    task_type, base_class = "CAUSAL_LM", transformers.AutoModelForCausalLM


class AutoPeftModelForSeq2SeqLM(_AutoPeftModel):
    """An adapter over an encoder-decoder language model."""

    task_type, base_class = "SEQ_2_SEQ_LM", transformers.AutoModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(_AutoPeftModel):
    """An adapter over a sequence classifier."""

    task_type, base_class = "SEQ_CLS", transformers.AutoModelForSequenceClassification


class AutoPeftModelForTokenClassification(_AutoPeftModel):
    """An adapter over a token classifier."""

    task_type, base_class = "TOKEN_CLS", transformers.AutoModelForTokenClassification


class AutoPeftModelForQuestionAnswering(_AutoPeftModel):
    """An adapter over an extractive question answering model."""

    task_type, base_class = "QUESTION_ANS", transformers.AutoModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(_AutoPeftModel):
    """An adapter over a model that answers hidden states."""

    task_type, base_class = "FEATURE_EXTRACTION", transformers.AutoModel
