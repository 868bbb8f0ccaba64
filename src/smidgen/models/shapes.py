"""Models of which only the configuration is there: a folder without weights, a JSON file, the header of a GGUF file."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from smidgen.errors import ModelError
from smidgen.foreign import shown
from smidgen.models.folder import check_configuration, check_documents
from smidgen.models.images import model_class
from smidgen.models.load import load_tokenizer, quiet, stop_token_ids

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Described:
    """A model without its weights. tokenizer: None where there is none. stops: the tokens that end an answer."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    stops: set[int]


def describe_model(place: Path) -> Described:
    """Read what describes the model at a place; weights are not looked at.

    Args:
        place: as `resolve_model(..., weights=False)` answers it.

    Raises:
        ModelError: a file is damaged, asks for code, or claims what no model has.
    """
    if place.suffix == ".gguf":
        from smidgen.models.gguf import describe

        config, tokenizer, ends = describe(place)
        return Described(config, tokenizer, _stops(tokenizer, ends))
    documents = check_documents(place) if place.is_dir() else {}
    path = place / "config.json" if place.is_dir() else place
    check_configuration(path)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # what a foreign configuration raises is open
        raise ModelError(f"{path}: is no configuration of a model: {shown(error)}") from None
    if not (place.is_dir() and any((place / name).is_file() for name in _TOKENIZERS)):
        return Described(config, None, set())
    tokenizer = load_tokenizer(place)
    ends = documents.get("generation_config.json", documents["config.json"]).get("eos_token_id")
    return Described(config, tokenizer, _stops(tokenizer, ends))


def _stops(tokenizer: PreTrainedTokenizerBase, ends: Any) -> set[int]:
    model: Any = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ends))
    return stop_token_ids(model, tokenizer)


def layer_count(config: PretrainedConfig) -> int:
    """How many layers the model has.

    Raises:
        ModelError: the configuration does not say.
    """
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(count, int) or count < 1:
        raise ModelError(f"the configuration of this {config.model_type} gives no number of layers")
    return count


def with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """A copy of a configuration for that many layers: the first ones, where they differ, and again from the start."""
    copied = copy.deepcopy(config)
    text, count = copied.get_text_config(), layer_count(config)
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == count:  # one entry for each layer
            setattr(text, name, (value * layers)[:layers])
    text.num_hidden_layers = layers
    return copied


def model_of(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """A causal language model with random weights, where tensors are made at the moment: the meta device, a fake mode.

    Raises:
        ModelError: there is no such model.
    """
    try:
        with quiet(), torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = model_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
            model.tie_weights()  # transformers 5.0 does not do so on the meta device
    except Exception as error:  # what a foreign configuration raises is open
        raise ModelError(f"no causal language model can be made of this configuration: {shown(error)}") from None
    return model


def linear_weights(model: Any) -> list[torch.Tensor]:
    """The weights of a base model that may be stored in few bits: those of all linear layers but the head."""
    head = model.get_output_embeddings()
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
