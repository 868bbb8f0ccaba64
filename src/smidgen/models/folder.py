"""A model's folder from elsewhere, checked before transformers reads it: what its files name and claim.

Nothing in such a folder can ask for code to be run, name a file outside of it, or claim a model that its weights do
not hold: the claim would be allocated.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from smidgen.data.sandbox import LONGEST_TEMPLATE
from smidgen.errors import ModelError
from smidgen.foreign import PICKLES, contained, read_object, read_text, shown
from smidgen.models.images import model_class
from smidgen.models.resolve import pickle_refused
from smidgen.safetensors_header import Tensor, read_header

_LARGEST_INDEX = 64 * 2**20  # bytes
_LARGEST_TOKENIZER = 256 * 2**20
_TEXTS = ("config.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")
_TEXTS += ("added_tokens.json", "chat_template.json", "preprocessor_config.json", "processor_config.json")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
_MOST_LAYERS = 1000
_MOST_POSITIONS = 2**24
_SIZES = ("size", "dim", "hidden", "inner", "heads", "n_head", "n_embd", "d_model", "d_ff", "d_kv")
_PACKED = 2  # numbers in a byte, at most: 4 bits each
# Without weights to hold them against: what a size, and a number of experts, may be in a configuration.
_LARGEST_SIZE = 2**22
_MOST_EXPERTS = 2**12


def check_model_folder(folder: Path, auto: Any = AutoModelForCausalLM) -> dict[str, Tensor]:
    """Check a model's folder, whose model `auto` will make; answer what its weights are, by their names in the files.

    Raises:
        ModelError: a file is damaged, leads out of the folder, asks for code, or claims more than the weights hold.
    """
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder}: holds a model and an adapter_config.json; keep the two in folders of their own")
    documents = check_documents(folder)
    if "config.json" not in documents:
        raise ModelError(f"{folder}: no config.json in it, so it is no model folder")
    tensors = read_weights(folder)
    held = _PACKED * sum(tensor.bytes for tensor in tensors.values())
    _check_sizes(folder / "config.json", documents["config.json"], min(_MOST_LAYERS, len(tensors)), held, held)
    _check_claim(folder, tensors, auto)
    return tensors


def check_configuration(path: Path) -> None:
    """Check a model's configuration that stands alone: its weights are not there, or do not count.

    Raises:
        ModelError: it is damaged, asks for code, or claims sizes that no model has.
    """
    document = read_object(path, ModelError)
    _refuse_code(path, document)
    _check_sizes(path, document, _MOST_LAYERS, _LARGEST_SIZE, _MOST_EXPERTS)


def check_documents(folder: Path) -> dict[str, dict[str, Any]]:
    """Check the settings and the tokenizer's files of a folder; answer the settings by the names of their files.

    Raises:
        ModelError: a file is damaged, leads out of the folder, or asks for code.
    """
    documents = {}
    for name in _TEXTS:
        if (folder / name).exists() or (folder / name).is_symlink():
            documents[name] = read_object(contained(folder, name, ModelError), ModelError)
            _refuse_code(folder / name, documents[name])
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja"):
        if (folder / name).exists() or (folder / name).is_symlink():
            size = contained(folder, name, ModelError).stat().st_size
            if size > _LARGEST_TOKENIZER or not (folder / name).is_file():
                raise ModelError(f"{folder / name}: {size:,} bytes; this is no tokenizer's file")
    return documents


def templates_of(folder: Path) -> dict[str, str]:
    """Answer the chat templates in a folder by where they stand, without loading the tokenizer.

    Raises:
        ModelError: a file of them is damaged or leads out of the folder.
    """
    found = {}
    more = (folder / "additional_chat_templates").glob("*.jinja")
    for name in ("chat_template.jinja", *sorted(f"{path.parent.name}/{path.name}" for path in more)):
        path = folder / name
        if path.exists() or path.is_symlink():
            found[name] = read_text(contained(path.parent, path.name, ModelError), ModelError, 4 * LONGEST_TEMPLATE)
    for name, document in check_documents(folder).items():
        template = document.get("chat_template")
        named = template if isinstance(template, list) else [{"name": "", "template": template}]
        for entry in named:
            if isinstance(entry, dict) and isinstance(entry.get("template"), str):
                found[f"{name} {shown(entry.get('name', ''))}".strip()] = entry["template"]
    return found


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Answer the tensors of a model's folder by name, read from the headers of its safetensors files.

    Raises:
        ModelError: a file is missing, no safetensors file, or does not lie in the folder.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        here, _ = read_header(path, ModelError)
        if twice := sorted(here.keys() & tensors.keys()):
            raise ModelError(f"{path}: the tensor '{shown(twice[0])}' is in another file too")
        tensors |= here
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """Answer the safetensors files that hold the model of a folder.

    Raises:
        ModelError: there is none, or one does not lie in the folder.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        names = ["model.safetensors"]
    elif index.exists():
        names = _shards(index)
    else:
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
        raise (
            pickle_refused(folder / pickles[0]) if pickles else ModelError(f"{folder}: no model.safetensors file in it")
        )
    return [contained(folder, name, ModelError) for name in names]


def _shards(index: Path) -> list[str]:
    weight_map = read_object(index, ModelError, largest=_LARGEST_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: weight_map must name the file of each tensor")
    names = []
    for name in dict.fromkeys(map(str, weight_map.values())):
        contained(index.parent, name, ModelError)
        if not name.endswith(".safetensors"):
            raise pickle_refused(index.parent / name)
        names.append(name)
    return names


def _refuse_code(path: Path, document: dict[str, Any]) -> None:
    for field, value in _fields(document):
        if field == "trust_remote_code" and value:
            raise ModelError(f"{path}: asks to trust code from elsewhere; a model's folder cannot ask that. Remove it")
        if "_implementation" in field and isinstance(value, str) and not value.isidentifier():
            raise ModelError(
                f"{path}: '{field}' names code of a hub, {shown(repr(value))}; it is not fetched. Remove the field"
            )


def _check_sizes(path: Path, config: dict[str, Any], layers: int, size: int, experts: int) -> None:
    """Refuse fields of a configuration that are larger than what is given, which is the most that can be meant."""
    for field, value in _fields(config):
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if field in _LAYERS:
            most = layers
        elif "positions" in field or "position_embeddings" in field:
            most = _MOST_POSITIONS
        elif "experts" in field:
            most = experts
        elif any(word in field for word in _SIZES):
            most = size
        else:
            continue
        if abs(value) > most:
            raise ModelError(f"{path}: {shown(field)} is {value:,}, more than such weights can hold ({most:,})")


def _check_claim(folder: Path, tensors: dict[str, Tensor], auto: Any) -> None:
    """Build the model without memory, and see that it is not larger than the weights."""
    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            made_by = model_class(config) if auto is AutoModelForCausalLM else auto
            model = made_by.from_config(config, trust_remote_code=False)
    except Exception as error:  # what a foreign configuration raises is open
        raise ModelError(f"{folder}: cannot be loaded as {kind_told(auto)}: {shown(error)}") from None
    claimed = sum(parameter.numel() for parameter in model.parameters())
    held = _PACKED * sum(tensor.bytes for tensor in tensors.values())
    if claimed > held:
        raise ModelError(
            f"{folder}: config.json describes a model of {claimed:,} numbers, the weights hold {held:,} at most"
        )


def kind_told(auto: Any) -> str:
    """What an Auto class of transformers makes, in words."""
    return (
        "a causal language model"
        if auto is AutoModelForCausalLM
        else auto.__name__.replace("AutoModelFor", "a model for ")
    )


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    """All fields of an object and of the objects in it."""
    if isinstance(value, dict):
        for field, item in value.items():
            yield field, item
            yield from _fields(item)
    elif isinstance(value, list):
        for item in value:
            yield from _fields(item)
