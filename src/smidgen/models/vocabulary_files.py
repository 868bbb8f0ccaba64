"""Adapter files over a larger vocabulary than the base's: what they need of the model, and what they hold of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smidgen.adapters.config import PeftConfig
from smidgen.adapters.files import KEY_PREFIX
from smidgen.adapters.targets import ends_with
from smidgen.errors import AdapterFileError, raise_all
from smidgen.models.vocabulary import (
    MOST_ADDED,
    Token,
    remember,
    resize,
    row_count,
    vocabulary_layers,
    vocabulary_of,
)

ROWS = "trainable_tokens_delta"
# How peft names what it wraps; the trained copy is in the file under the plain name too.
_COPIES = ("original_module.weight", "modules_to_save.weight")
_BASES = ("token_adapter.base_layer.weight", "base_layer.weight", "weight")


def metadata_of(model: Any, config: PeftConfig) -> dict[str, Any]:
    """What a file says about the vocabulary: its rows where they grew, and the tokens that the adapter trains."""
    state, rows = vocabulary_of(model), row_count(model)
    trained = _indices(config)
    tokens = {name: token._asdict() for name, token in state.tokens.items() if token.id in trained}
    grown = {"vocabulary_rows": rows} if rows > state.base_rows else {}
    return grown | ({"tokens": tokens} if tokens else {})


def fit_vocabulary(
    model: Any, config: PeftConfig, tensors: dict[str, Tensor], metadata: dict[str, Any], place: str
) -> dict[str, Tensor]:
    """Grow the vocabulary of `model` to what the file was trained with; answer the tensors that the adapter takes.

    Files of peft may hold the whole embedding of a resized base. Its old rows have to be the base's; its new rows
    become trained rows of the adapter (`config` then names them), so that saving it again needs them alone.

    Raises:
        AdapterFileError: the file's embedding is not the base's, or it asks for more rows than any tokenizer adds.
    """
    layers = vocabulary_layers(model)
    if not layers:
        return tensors
    tensors, base_rows = dict(tensors), vocabulary_of(model).base_rows
    named = {path for path in layers if any(path.endswith(name) for name in config.modules_to_save or ())}
    if getattr(config, "ensure_weight_tying", False):  # then the copy stands at all layers that share the weight
        shared = {id(layers[path].weight) for path in named}
        named = {path for path, layer in layers.items() if id(layer.weight) in shared}
    whole = {path: _take_whole(path, path in named, tensors) for path in layers}
    wanted = [metadata.get("vocabulary_rows", 0), max(_indices(config), default=-1) + 1]
    wanted += [len(rows) for rows, _ in whole.values() if rows is not None]
    if not all(type(count) is int for count in wanted) or max(wanted) > base_rows + MOST_ADDED:
        raise AdapterFileError(
            f"{place}: asks for {max(map(str, wanted), key=len)} rows of vocabulary, the base has {base_rows:,}: "
            "another base model, or a broken file"
        )
    problems = []
    for path, (rows, replaced) in whole.items():
        if rows is not None and not replaced and not _same_rows(rows, layers[path].weight, base_rows):
            problems.append(f"{place}: the embedding in the file for '{path}' is not the base's: another base model")
    raise_all(AdapterFileError, problems)
    tokens = metadata.get("tokens", {})
    resize(model, max(wanted))
    remember(model, {name: Token(int(token["id"]), bool(token["special"])) for name, token in tokens.items()}, place)
    first: dict[int, str] = {}
    embedding = next(path for path, layer in layers.items() if layer is model.get_input_embeddings())
    for path, (rows, replaced) in whole.items():
        if rows is None or replaced:
            continue
        owner = first.setdefault(id(layers[path].weight), path)
        if f"{KEY_PREFIX}{path}.base_layer.weight" in tensors:  # an adapter on the whole embedding stands on its rows
            _set_rows(layers[path].weight, rows, base_rows)
        elif owner == path:
            _train_rows(config, path, embedding, rows, base_rows, tensors)
        else:
            _drop_tied(path, owner, tensors, place)
    return tensors


def _indices(config: PeftConfig) -> set[int]:
    """All token ids that the adapter trains rows of."""
    named: Any = getattr(config, "trainable_token_indices", None) or []
    return {index for indices in (named.values() if isinstance(named, dict) else [named]) for index in indices}


def _take_whole(path: str, replaced: bool, tensors: dict[str, Tensor]) -> tuple[Tensor | None, bool]:
    """The file's whole weight (V, D) for the layer at `path`, and whether it is trained and replaces the base's.

    Only what the adapter itself takes is left in `tensors`.
    """
    stem = f"{KEY_PREFIX}{path}."
    for copy in _COPIES:
        if stem + "weight" in tensors:
            tensors.pop(stem + copy, None)
    key = next((stem + name for name in _BASES if stem + name in tensors), None)
    if key is None:
        return None, False
    kept = replaced or key == f"{stem}base_layer.weight"
    return (tensors[key] if kept else tensors.pop(key)), replaced


def _same_rows(file: Tensor, weight: Tensor, base_rows: int) -> bool:
    """Whether the rows that both have are equal, but for the rounding of 16-bit files."""
    count = min(base_rows, len(file))
    here, there = weight.detach()[:count].float().cpu(), file[:count].float().cpu()
    return here.shape == there.shape and torch.allclose(here, there, rtol=1e-2, atol=1e-4)


@torch.no_grad()
def _set_rows(weight: Tensor, rows: Tensor, base_rows: int) -> None:
    weight[base_rows : len(rows)] = rows[base_rows:].to(weight)


def _train_rows(
    config: Any, path: str, embedding: str, rows: Tensor, base_rows: int, tensors: dict[str, Tensor]
) -> None:
    """Make the added rows that the adapter does not train yet rows that it trains."""
    key = f"{KEY_PREFIX}{path}.token_adapter.{ROWS}"
    named = by_layer(config.trainable_token_indices, embedding)
    here = next((name for name in named if ends_with(path, name)), path.rpartition(".")[2])
    trained = list(named.get(here, ()))
    added = [index for index in range(base_rows, len(rows)) if index not in trained]
    if added:
        config.trainable_token_indices = named | {here: trained + added}
        tensors[key] = torch.cat([*([tensors[key]] if key in tensors else []), rows[added].float()])


def by_layer(named: list[int] | dict[str, list[int]] | None, embedding: str) -> dict[str, list[int]]:
    """`trainable_token_indices` by the name of the layer; a list means the input embedding, at the path `embedding`."""
    return named if isinstance(named, dict) else {embedding.rpartition(".")[2]: list(named)} if named else {}


def _drop_tied(path: str, owner: str, tensors: dict[str, Tensor], place: str) -> None:
    """Of layers that share one weight the first has the rows; the file's second copy must be equal."""
    mine, its = (f"{KEY_PREFIX}{name}.token_adapter.{ROWS}" for name in (path, owner))
    other = tensors.pop(mine, None)
    if other is not None and not (its in tensors and torch.equal(other, tensors[its][: len(other)])):
        raise AdapterFileError(f"{place}: '{path}' and '{owner}' share one weight here, their rows in the file differ")
