"""The rows of a model's vocabulary: they grow for new tokens, and go back to what they were.

The base's own rows stay as they are, bit by bit, and so do its answers: the head computes added rows apart from them.

Legend: V rows of the vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smidgen.adapters.attach import Adapted, MadeInPlace, class_with, class_without, merged_names
from smidgen.adapters.base import Adapter, base_modules
from smidgen.adapters.trained import Mirror, TokenRows, TrainedCopy
from smidgen.errors import AdapterFileError, UsageError, raise_all

# More rows than any tokenizer adds: a file that asks for them is a mistake, or an attack on the memory.
MOST_ADDED = 65_536


class Token(NamedTuple):
    """A token that an adapter trains: its id, and whether decoding may skip it."""

    id: int
    special: bool


@dataclass
class Vocabulary:
    """What was done to a model's vocabulary: how many rows the base has by itself, and the known tokens by string."""

    base_rows: int
    tokens: dict[str, Token] = field(default_factory=dict)


class GrownHead(MadeInPlace):
    """Put in front of a head's class: a matrix of another width is rounded otherwise, so added rows are apart."""

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        rows, bias = self.__dict__["_base_rows"], module.bias
        own = F.linear(x, module.weight[:rows], None if bias is None else bias[:rows])
        added = F.linear(x, module.weight[rows:], None if bias is None else bias[rows:])
        return torch.cat([own, added], dim=-1)


def vocabulary_of(model: Any) -> Vocabulary:
    """What was done to the vocabulary of `model`."""
    return model.__dict__.get("_vocabulary") or Vocabulary(row_count(model))


def vocabulary_layers(model: Any) -> dict[str, Any]:
    """The input embedding and, where there is one, the head, by path; empty for models that have no tokens."""
    asked = [getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings")]
    wanted = [layer for get in asked if get is not None and hasattr(layer := get(), "weight")]
    return {path: module for path, module in base_modules(model) if any(module is layer for layer in wanted)}


def row_count(model: Any) -> int:
    """V, the rows of the input embedding; 0 for a model without one."""
    return next((layer.weight.shape[0] for layer in vocabulary_layers(model).values()), 0)


@torch.no_grad()
def resize(model: Any, rows: int) -> None:
    """Give the embedding and the head `rows` rows, but never fewer than the base has.

    Modules and parameters stay the same objects, so what is tied stays tied. An added row is the mean of the base's
    rows (an added bias 0): the answers to other tokens are then changed least, see
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html.

    Raises:
        UsageError: adapters are merged, or one that stands at these layers has the size of the old vocabulary.
    """
    state, layers = vocabulary_of(model), vocabulary_layers(model)
    rows = max(rows, state.base_rows)
    if rows == row_count(model):
        return
    if merged_names(model):
        raise UsageError("adapters are merged into the weights; call unmerge_adapter() before the vocabulary changes")
    raise_all(
        UsageError,
        [
            f"adapter '{name}' covers all {row_count(model):,} rows of '{path}', so the vocabulary cannot change; "
            "delete that adapter first"
            for path, name, adapter in _adapters_at(layers)
            if not _holds_rows(adapter)
        ],
    )
    model.__dict__["_vocabulary"] = state
    resized: set[int] = set()
    for layer in layers.values():
        for name, parameter in layer.named_parameters(recurse=False):
            if id(parameter) not in resized:
                resized.add(id(parameter))
                parameter.data = _with_rows(parameter.data, state.base_rows, rows, mean=name == "weight")
        layer.__dict__["num_embeddings" if isinstance(layer, nn.Embedding) else "out_features"] = rows
        if isinstance(layer, nn.Linear):
            _mark_head(layer, state.base_rows if rows > state.base_rows else None)
    model.config.get_text_config().vocab_size = rows
    if hasattr(model, "vocab_size"):
        model.vocab_size = rows


def give_back(model: Any) -> None:
    """Take away the added rows that no adapter needs any longer, and forget their tokens."""
    layers = vocabulary_layers(model)
    if not layers:
        return
    needed: set[int] = set()
    for _, _, adapter in _adapters_at(layers):
        if not _holds_rows(adapter):
            return  # it has the size of the vocabulary as it is now
        needed.update(adapter.indices.tolist() if isinstance(adapter, TokenRows) else ())
    state = vocabulary_of(model)
    resize(model, max(needed, default=-1) + 1)
    state.tokens = {name: token for name, token in state.tokens.items() if token.id in needed}
    if not needed:
        settle(model)


def settle(model: Any) -> None:
    """Make the added rows the model's own, as in full tuning and after merging: nothing remains to be given back."""
    for layer in vocabulary_layers(model).values():
        _mark_head(layer, None)
    model.__dict__.pop("_vocabulary", None)


def remember(model: Any, tokens: Mapping[str, Token], place: str = "") -> None:
    """Note the ids of tokens, so that adapters are saved with their strings.

    Raises:
        AdapterFileError: an id has another string already, or a string another id; each is named.
    """
    state = vocabulary_of(model)
    known = state.tokens
    by_id = {token.id: name for name, token in known.items()}
    problems = [
        f"{place}: token {name} has id {token.id} there, but in this model "
        + (f"id {known[name].id}" if name in known else f"that is the id of {by_id[token.id]}")
        for name, token in tokens.items()
        if (name in known and known[name].id != token.id) or by_id.get(token.id, name) != name
    ]
    raise_all(AdapterFileError, problems)
    known.update(tokens)
    model.__dict__["_vocabulary"] = state


def untouched_rows(model: Any, name: str) -> dict[str, int]:
    """For each layer of the vocabulary, by path: how many first rows the adapter `name` leaves as the base has them.

    A model that its owner resized by hand, before it got the adapter, is equal to the one before in these rows.
    """
    rows = {}
    for path, layer in vocabulary_layers(model).items():
        adapter = layer.adapters[name] if isinstance(layer, Adapted) and name in layer.adapters else None
        adapter = adapter.owner if isinstance(adapter, Mirror) else adapter
        rows[path] = 0 if isinstance(adapter, TrainedCopy) else vocabulary_of(model).base_rows
        trained = adapter.indices.tolist() if isinstance(adapter, TokenRows) else []
        while rows[path] - 1 in trained:
            rows[path] -= 1
    return rows


def _adapters_at(layers: Mapping[str, Any]) -> Iterator[tuple[str, str, Adapter]]:
    for path, layer in layers.items():
        if isinstance(layer, Adapted):
            yield from ((path, name, adapter) for name, adapter in layer.adapters.items())  # type: ignore[misc]


def _holds_rows(adapter: Any) -> bool:
    return isinstance(adapter.owner if isinstance(adapter, Mirror) else adapter, TokenRows)


def _with_rows(tensor: Tensor, base_rows: int, rows: int, mean: bool) -> Tensor:
    """The first `rows` rows of `tensor`, with rows of the mean of the base's (or 0) where it has fewer."""
    if rows <= tensor.shape[0]:
        return tensor[:rows].clone()
    if tensor.is_meta:
        raise UsageError("the embedding is offloaded, so it cannot get new rows: load the model into memory")
    row = tensor[:base_rows].float().mean(0).to(tensor.dtype) if mean else tensor.new_zeros(tensor.shape[1:])
    return torch.cat([tensor, row.expand(rows - tensor.shape[0], *tensor.shape[1:])])


def _mark_head(layer: Any, base_rows: int | None) -> None:
    """Let the head compute added rows apart, below its adapters; None: as its own class does."""
    kind = class_without(class_without(type(layer), Adapted), GrownHead)
    if base_rows is not None:
        layer.__dict__["_base_rows"] = base_rows
        kind = class_with(GrownHead, kind)
    else:
        layer.__dict__.pop("_base_rows", None)
    layer.__class__ = class_with(Adapted, kind) if isinstance(layer, Adapted) else kind
