"""The names people type: `get_peft_model`, `PeftModel`, and what an adapted model can do.

`get_peft_model` answers the same object, adapted in place: it is still a ``LlamaForCausalLM`` with `generate` and has
the methods of `AdaptedModel` on top. Where transformers has a method of the same name, the signature here is peft's.
"""

from __future__ import annotations

import copy
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import DynamicCache
from transformers.utils import SAFE_WEIGHTS_NAME

from smidgen.adapters import attach
from smidgen.adapters.attach import MadeInPlace, State, class_with, class_without
from smidgen.adapters.base import Adapter, in_adapter
from smidgen.adapters.combine import Combination, combine
from smidgen.adapters.config import PeftConfig
from smidgen.adapters.expert_layouts import fuse_experts
from smidgen.adapters.experts import untouched
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
from smidgen.adapters.hub import as_keys, fusion_keys
from smidgen.adapters.init.taken import as_plain, changes_base, check_told, fields_of
from smidgen.adapters.methods.lora import LoraConfig
from smidgen.adapters.trained import Mirror, TokenRows
from smidgen.errors import AdapterFileError, MergeError, UsageError
from smidgen.models.composed import Composed
from smidgen.models.fingerprint import fingerprint, is_base_of
from smidgen.models.quantize import parameter_count, take_over_bitsandbytes, unquantize
from smidgen.models.tasks import (
    check_heads,
    label_fields,
    labels_of,
    names_labels,
    new_heads,
    replaced_modules,
)
from smidgen.models.vocabulary import give_back, row_count, settle, untouched_rows, vocabulary_of
from smidgen.models.vocabulary_files import fit_vocabulary, metadata_of
from smidgen.registry import METHODS


class AdaptedModel(Composed, MadeInPlace):
    """Put in front of the class of a model that has adapters; a mixin, never made by itself."""

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
        """Print how much of the model is trained, in one line; of a mixture also which experts are left out."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")
        if left := untouched(self, self.active_adapters):
            print(left)

    # --- what adapters ask of the model ---------------------------------------------------------------------------

    def new_cache(self) -> DynamicCache:
        """An empty cache for the keys and values of the model's layers."""
        return DynamicCache(config=self.config)

    def token_ids(self, text: str, tokenizer: str) -> list[int]:
        """The ids of a text's tokens, by the tokenizer of a model's folder (or id), without special tokens.

        Raises:
            UsageError: there is no such tokenizer, or the text has no token.
        """
        from smidgen.models.load import load_tokenizer  # it imports this module
        from smidgen.models.resolve import resolve_model

        ids = load_tokenizer(resolve_model(tokenizer))(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UsageError(f"the text {text!r} has no token")
        return list(ids)

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
        method = method_of(peft_config)
        with self._all_or_none():
            self._take_in(peft_config)
            places = list(method.plan(self, peft_config))
            attach.attach(self, self._adapters, adapter_name, places, method, peft_config)
        if not autocast_adapter_dtype:
            for _, adapter in attach.adapters_of(self, adapter_name):
                adapter.to(self.dtype)
        peft_config.base_model_name_or_path = peft_config.base_model_name_or_path or _base_name(self)
        self._set_trainable(adapter_name, False)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Attach a weighted combination of LoRA adapters as another one; see `adapters.combine.Combination`.

        It does not answer before `set_adapter`. Its factors hold the weights and scales: its own scale is 1.

        Raises:
            UsageError: the adapters cannot be combined so; every reason is told, and nothing was changed.
        """
        how = Combination(combination_type, svd_rank, svd_driver, density, majority_sign_method)
        config, factors = combine(self, self._adapters, adapters, weights, how)
        self.add_adapter(adapter_name, config)
        for path, adapter in attach.adapters_of(self, adapter_name):
            if path in factors:
                adapter.set_factors(*factors[path])  # pyright: ignore[reportCallIssue]

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Let only these adapters answer, and train them unless `inference_mode`."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_names(names)
        for name in self._adapters.configs:
            self._set_trainable(name, name in names and not inference_mode)
        self._adapters.active, self._adapters.branches = names, []

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off the model, and rows of the vocabulary that were added for it alone."""
        self._check_names([adapter_name])
        for other, config in self._adapters.configs.items():
            if adapter_name in getattr(config, "adapters", ()):
                raise UsageError(f"adapter '{adapter_name}' is one of those that '{other}' fuses; delete that first")
        if adapter_name in attach.merged_names(self):
            raise UsageError(f"adapter '{adapter_name}' is merged into the weights; call unmerge_adapter() first")
        attach.detach(self, self._adapters, adapter_name)
        give_back(self)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model's own answers inside the block, to the bit."""
        with attach.switched_off(self, self._adapters):
            yield

    def _set_trainable(self, name: str, trainable: bool) -> None:
        for _, adapter in attach.adapters_of(self, name):
            adapter.requires_grad_(trainable)

    # --- merging --------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = True) -> None:
        """Fold adapters (default: the active ones) into the weights. `safe_merge` or not, it is always checked.

        Raises:
            MergeError: a method cannot be merged, or a merged tensor is not finite; the model is as before.
        """
        if adapter_names is None and self._adapters.branches:
            raise MergeError("a composition answers now, which no weights can: name the adapters to merge")
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
        for name in names:
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            self._save_one(name, folder, bool(save_embedding_layers), state_dict)
            if re.fullmatch(r"checkpoint-\d+", folder.name):
                # transformers' Trainer resumes from, and ends with, what it finds under this name.
                shutil.copyfile(folder / WEIGHTS_NAME, folder / SAFE_WEIGHTS_NAME)

    def _save_one(
        self, name: str, folder: Path, embeddings: bool = True, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write one adapter into `folder`; the arguments are those of `save_pretrained`."""
        config = self._adapters.configs[name]
        tensors = adapter_state_dict(self, name, state_dict)
        if embeddings and not attach.merged_names(self):
            grown = row_count(self) > vocabulary_of(self).base_rows
            tensors |= base_embeddings(self, name, config, grown)
        written, tensors, marks = as_plain(config, tensors)
        written = copy.copy(written)
        written.inference_mode = True
        if isinstance(written, LoraConfig):  # peft warns of it where nothing is tied
            written.ensure_weight_tying = any(
                isinstance(adapter, Mirror) and not isinstance(adapter.owner, TokenRows)
                for _, adapter in attach.adapters_of(self, name)
            )
        save_adapter(
            folder, tensors, written, marks | metadata_of(self, config) | self._base_marks(name) | _labels(self)
        )
        for part in getattr(config, "adapters", ()):  # those that it fuses: the folder is whole
            self._save_one(part, folder / part, embeddings, state_dict)

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
        fields = fields_of(metadata, str(folder))
        # Frozen while it is made: what starts it is in the file.
        config = PeftConfig.from_pretrained(folder, **{**fields, "inference_mode": True})
        check_told(config, metadata, str(folder))
        try:
            with self._all_or_none():
                tensors = as_keys(self, tensors)
                tensors = fuse_experts(self, config, tensors, str(folder))
                tensors = fit_vocabulary(self, config, tensors, metadata, str(folder))
                self._check_base(folder, metadata, force)
                if new:
                    self._take_in(config, folder)
                    self.add_adapter(adapter_name, config, autocast_adapter_dtype=autocast_adapter_dtype)
                tensors = fusion_keys(tensors, getattr(self._adapters.configs[adapter_name], "adapters", []))
                load_tensors(self, adapter_name, tensors, str(folder))
                check_heads(self, adapter_name, new_heads(self), str(folder))
        except UsageError:
            give_back(self)
            raise
        self._take_labels(metadata.get("labels", []))
        self._adapters.configs[adapter_name].inference_mode = not is_trainable
        self._set_trainable(adapter_name, is_trainable)

    def _base_marks(self, name: str) -> dict[str, Any]:
        """What the file of the adapter `name` says about its base; nothing while adapters are merged into it."""
        if attach.merged_names(self):
            return {}
        marks: dict[str, Any] = {"base_fingerprint": fingerprint(self)}
        if changes_base(self._adapters.configs[name]):
            marks["stored_anew"] = True
        rows, replaced = untouched_rows(self, name), replaced_modules(self, name)
        if replaced or any(count < vocabulary_of(self).base_rows for count in rows.values()):
            marks |= {"untouched_rows": rows, "replaced_modules": replaced}
            marks["untouched_fingerprint"] = fingerprint(self, rows, replaced)
        return marks

    def _take_labels(self, labels: list[str]) -> None:
        """The classes are called as in the training of the adapter, whose head answers."""
        if labels and len(labels) == getattr(self.config, "num_labels", 0):
            self.config.update(label_fields(labels))

    def _check_base(self, folder: Path, metadata: dict[str, Any], force: bool) -> None:
        if force or attach.merged_names(self) or is_base_of(self, metadata):
            return
        raise AdapterFileError(
            f"{folder}: trained on base {metadata['base_fingerprint'][:12]}, this is {fingerprint(self)[:12]}: other "
            "weights or another shape. Load the base it was trained on (--base), or load it all the same (--force, "
            "force=True)"
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
        with _attaching(model) as adapted:
            if config is not None:
                adapted.add_adapter(adapter_name, config)
            adapted.load_adapter(model_id, adapter_name, is_trainable, **kwargs)
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
    with _attaching(model) as adapted:
        peft_config.revision = revision or peft_config.revision
        adapted.add_adapter(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)
    adapted.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
    return adapted


@contextmanager
def _attaching(model: Any) -> Iterator[Any]:
    """The model, made to take adapters: as before where the block fails; its base frozen where it had none."""
    fresh = not isinstance(model, AdaptedModel)
    adapted = _adaptable(model)
    try:
        yield adapted
    except Exception:
        if fresh:
            adapted.unload()
        raise
    if fresh:
        _freeze_base(model)


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


def method_of(config: PeftConfig) -> Any:
    for entry in METHODS.values():
        method = entry.load()
        if method.config_class is type(config) and issubclass(method, Adapter):
            return method
    raise UsageError(f"{type(config).__name__} is no configuration of an adapter; take LoraConfig, for example")


def _labels(model: Any) -> dict[str, list[str]]:
    """The names of the classes, where they were chosen."""
    return {"labels": labels_of(model)} if names_labels(getattr(model, "config", None)) else {}


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
