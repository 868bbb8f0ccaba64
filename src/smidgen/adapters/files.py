"""Adapter files: what is written, what is read, and that it fits. Both ways the keys are Hugging Face's.

A parameter stands at ``<module>.adapters.<name>.lora_A.weight``; with the middle cut out that is its key. Loading is
strict both ways.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from smidgen.adapters import hub as hub_format
from smidgen.adapters.attach import adapters_of
from smidgen.adapters.base import Adapter
from smidgen.adapters.config import CONFIG_NAME, PeftConfig
from smidgen.adapters.init.taken import taken_apart
from smidgen.adapters.trained import Mirror, TokenRows, TrainedCopy
from smidgen.errors import AdapterFileError, did_you_mean
from smidgen.foreign import PICKLES, contained, parse_json
from smidgen.safetensors_header import read_header

WEIGHTS_NAME = "adapter_model.safetensors"
MLX_WEIGHTS_NAME = "adapters.safetensors"
HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only")
KEY_PREFIX = "base_model.model."
# What an embedding and a head are called in the models whose adapter files carry their base weights.
_EMBEDDING_NAMES = {"embed_tokens", "lm_head"}


def adapter_folder(name: str | Path, **hub: Any) -> Path:
    """The folder of an adapter: a local one, or a copy of the hub's, which only then is asked.

    Raises:
        AdapterFileError: there is neither.
    """
    folder = Path(name)
    if str(name).startswith(("\\\\", "//")):
        raise AdapterFileError(f"{name}: refused: a network share; copy the adapter's folder here")
    if os.path.isdir(folder):
        if not os.path.isfile(folder / CONFIG_NAME):
            raise AdapterFileError(f"{folder}: no {CONFIG_NAME} in this folder, so it is not an adapter's")
        return folder
    if os.path.exists(folder) or folder.is_absolute() or str(name).startswith(".") or str(name).count("/") > 1:
        raise AdapterFileError(f"{name}: no such adapter folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        files = [CONFIG_NAME, WEIGHTS_NAME, hub_format.WEIGHTS_NAME, f"*/{CONFIG_NAME}", f"*/{WEIGHTS_NAME}"]
        return Path(snapshot_download(str(name), allow_patterns=files, **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterFileError(f"{name}: neither a folder here nor an adapter on the hub: {error}") from error


def adapter_state_dict(model: nn.Module, name: str, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of the adapter `name` under the keys of its file.

    Args:
        state_dict: take the values from here (a model's state dict, gathered from several processes).
    """
    tensors: dict[str, Tensor] = {}
    for path, adapter in adapters_of(model, name):
        for parameter, tensor in adapter.file_tensors().items():
            here = f"{path}.adapters.{name}.{parameter}".lstrip(".")
            tensor = tensor if state_dict is None else state_dict.get(here, tensor)
            tensors[adapter.file_key(path, parameter)] = tensor.detach()
    return tensors


def base_embeddings(model: Any, name: str, config: PeftConfig, grown: bool) -> dict[str, Tensor]:
    """The base weights of adapted embeddings, which files of such adapters carry along.

    Args:
        grown: the vocabulary has rows that the base lacks: then whatever the embedding is called.
    """
    targets = getattr(config, "target_modules", None)
    named = isinstance(targets, list) and _EMBEDDING_NAMES & {target.rpartition(".")[2] for target in targets}
    if not named and not grown:
        return {}
    if getattr(config, "trainable_token_indices", None):
        return {}
    layers = {model.get_input_embeddings(), model.get_output_embeddings()}
    return {
        f"{KEY_PREFIX}{path}.base_layer.weight": layer.weight.detach()
        for path, adapter in adapters_of(model, name)
        if (layer := model.get_submodule(path)) in layers
        and not isinstance(adapter, TrainedCopy)
        and not isinstance(getattr(adapter, "owner", adapter), TokenRows)
    }


def save_adapter(folder: Path, tensors: dict[str, Tensor], config: PeftConfig, metadata: dict[str, Any]) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``; each appears whole or not at all.

    Args:
        metadata: what smidgen wants to know when it loads the file; other tools ignore it.

    Raises:
        AdapterFileError: a tensor holds values that are not finite.
    """
    wrong = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if wrong:
        raise AdapterFileError(f"not saved: {len(wrong)} tensors are not finite: {', '.join(wrong[:5])}")
    write_tensors(folder / WEIGHTS_NAME, tensors, metadata)
    config.save_pretrained(folder)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a safetensors file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    copies = {key: tensor.to("cpu").contiguous().clone() for key, tensor in tensors.items()}
    save_file(copies, partial, metadata={"format": "pt", "smidgen": json.dumps(metadata)})
    os.replace(partial, path)


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an adapter folder by key, and the metadata that smidgen wrote (empty from other tools).

    Raises:
        AdapterFileError: the file is missing, is a pickle, or is not a safetensors file.
    """
    path = next((folder / name for name in (WEIGHTS_NAME, hub_format.WEIGHTS_NAME) if (folder / name).is_file()), None)
    if path is None:
        found = [*folder.glob("adapter_model.*"), *folder.glob("pytorch_adapter.*")]
        pickles = sorted(other.name for other in found if other.suffix in PICKLES)
        if pickles:
            raise AdapterFileError(
                f"{folder / pickles[0]}: refused unread: a pickle can run code. Convert it to {WEIGHTS_NAME} where you "
                "trust it (safetensors.torch.save_file)"
            )
        mlx = "; smidgen convert --to peft reads mlx-lm's" if (folder / MLX_WEIGHTS_NAME).is_file() else ""
        raise AdapterFileError(f"{folder}: no {WEIGHTS_NAME} in this folder{mlx}")
    tensors, texts = read_tensors(contained(folder, path.name, AdapterFileError))
    return tensors, _metadata(texts, path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by key, and its metadata.

    Raises:
        AdapterFileError: it is not a safetensors file.
    """
    described, texts = read_header(path, AdapterFileError)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in described}, texts
    except (SafetensorError, ValueError, OSError) as error:
        raise AdapterFileError(f"{path}: not a readable safetensors file: {error}") from error


def _metadata(texts: dict[str, str], path: Path) -> dict[str, Any]:
    metadata = parse_json(texts.get("smidgen", "{}"), f"{path}: metadata of smidgen", AdapterFileError)
    if not (isinstance(metadata, dict) and isinstance(metadata.get("base_fingerprint", ""), str)):
        raise AdapterFileError(f"{path}: metadata of smidgen: must be an object whose base_fingerprint is text")
    for name in ("labels", "replaced_modules"):
        listed = metadata.get(name, [])
        if not (isinstance(listed, list) and all(isinstance(item, str) for item in listed)):
            raise AdapterFileError(f"{path}: metadata of smidgen: {name} must be a list of texts")
    return metadata


def saved_labels(folder: Path) -> list[str]:
    """The names of the classes that an adapter was trained for; none where its file names none."""
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        return []
    _, texts = read_header(contained(folder, path.name, AdapterFileError), AdapterFileError)
    return _metadata(texts, path).get("labels", [])


@torch.no_grad()
def load_tensors(model: nn.Module, name: str, tensors: dict[str, Tensor], place: str) -> None:
    """Copy `tensors` (by file key) into the adapter `name`; `place` is named in errors.

    Raises:
        AdapterFileError: keys are missing or left over, or shapes differ. Nothing was copied then.
    """
    wanted: dict[str, tuple[Adapter, Tensor]] = {}
    repeated: dict[str, str] = {}
    for path, adapter in adapters_of(model, name):
        repeated |= adapter.repeated(path)
        adapter.fit_file(tensors.keys())
        for parameter, tensor in adapter.file_tensors().items():
            wanted[adapter.file_key(path, parameter)] = (adapter, tensor)
    tensors = taken_apart(tensors, {key: tensor for key, (_, tensor) in wanted.items()})
    problems = _base_weights(model, name, tensors)
    known = wanted.keys() | repeated.keys()
    extra = [key for key in tensors if key not in known and not key.endswith(".base_layer.weight")]
    missing = [key for key, (adapter, _) in wanted.items() if key not in tensors and not isinstance(adapter, Mirror)]
    if missing or extra:
        lines = [f"{place}: the adapter does not fit the model: {len(missing)} missing, {len(extra)} unexpected"]
        lines += [f"  missing: {key}" for key in missing[:4]] + [f"  unexpected: {key}" for key in extra[:4]]
        problems.append("\n".join([*lines, f"  likely cause: {_likely_cause(missing, extra)}"]))
    for key in repeated.keys() & tensors.keys():
        if not torch.equal(tensors[key], tensors.get(repeated[key], tensors[key])):
            problems.append(f"{place}: {key} differs from {repeated[key]}, which it should repeat")
    for key in wanted.keys() & tensors.keys():
        here, there = tuple(wanted[key][1].shape), tuple(tensors[key].shape)
        if here != there:
            problems.append(
                f"{place}: {key} has shape {list(there)}, the model needs {list(here)}: another base or rank"
            )
    for path, adapter in adapters_of(model, name) if not problems else ():
        found = {parameter: tensors.get(adapter.file_key(path, parameter)) for parameter in adapter.file_tensors()}
        problems += [f"{place}: {path}: {line}" for line in adapter.unfit(found)]
    if problems:
        raise AdapterFileError("\n".join(sorted(problems)))
    mirrored = {key for key, (adapter, _) in wanted.items() if isinstance(adapter, Mirror)}
    for key, (_, tensor) in wanted.items():
        if key not in mirrored:
            tensor.copy_(tensors[key])
    for key in mirrored & tensors.keys():
        if not torch.equal(wanted[key][1], tensors[key].to(wanted[key][1].dtype)):
            raise AdapterFileError(
                f"{place}: {key} differs from the layer it is tied to; set ensure_weight_tying=False"
            )


def _base_weights(model: Any, name: str, tensors: dict[str, Tensor]) -> list[str]:
    """A line for each base weight in the file that is not the base model's."""
    problems = []
    for key in (key for key in tensors if key.endswith(".base_layer.weight")):
        path = key.removeprefix(KEY_PREFIX).removesuffix(".base_layer.weight")
        try:
            weight: Tensor = model.get_submodule(path).weight
        except AttributeError:
            problems.append(f"{key}: the model has no such layer")
            continue
        if weight.shape != tensors[key].shape:
            problems.append(
                f"{key}: the file's embedding has {tensors[key].shape[0]} rows, the model's {weight.shape[0]}: "
                "call model.resize_token_embeddings first"
            )
        elif not torch.allclose(weight.float(), tensors[key].to(weight.device).float(), rtol=1e-2, atol=1e-4):
            problems.append(f"{key}: the file's base weight is not the model's: another base model")
    return problems


def _likely_cause(missing: list[str], extra: list[str]) -> str:
    if extra and not missing:
        return "the adapter was made for a larger model, or with options that adapter_config.json does not name"
    if missing and not extra:
        return "the file is incomplete, or from a smaller model"
    names = {key.removeprefix(KEY_PREFIX) for key in missing}
    if all(key.startswith(KEY_PREFIX * 2) or not key.startswith(KEY_PREFIX) for key in extra):
        return f"the keys carry another prefix than '{KEY_PREFIX}'"
    if any(key.removeprefix(KEY_PREFIX).replace(".default.", ".") in names for key in extra):
        return "the keys still hold the adapter's name"
    old, new = Counter(_module_name(key) for key in extra), Counter(_module_name(key) for key in missing)
    renamed = [f"'{name}' is called '{other}' here" for name, other in zip(old - new, new - old, strict=False)]
    hint = did_you_mean(extra[0], missing).removeprefix("; ")
    return "; ".join(renamed) or hint or "another base model"


def _module_name(key: str) -> str:
    """The name of the module that a key's parameter stands at."""
    return key.partition(".lora_")[0].rpartition(".")[2]
