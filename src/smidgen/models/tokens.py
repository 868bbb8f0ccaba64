"""New tokens and untrained ones: they get rows of the vocabulary that are trained beside an adapter.

Legend: V rows of the vocabulary, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor

from smidgen.adapters.attach import Adapted
from smidgen.adapters.files import read_adapter
from smidgen.adapters.trained import TokenRows
from smidgen.errors import AdapterFileError, UsageError, raise_all
from smidgen.models.vocabulary import Token, remember, resize, row_count, vocabulary_layers, vocabulary_of
from smidgen.models.vocabulary_files import by_layer
from smidgen.recipe import DataRecipe

Say = Callable[[str], None]

# Distances are in units of the median distance of a row from the mean row. In SmolLM2-135M the nearest two trained
# rows are 0.38 apart ("Ġsizable", "Ġsizeable"), a chat token after short tuning 0.17 from an unused one, and unused
# rows 0.001 from each other.
_NEAR = 0.05
_SAMPLED = 8192  # rows that stand for all
_DIRECTIONS = 64


def add_tokens(
    model: Any, tokenizer: Any, tokens: Sequence[str] = (), special_tokens: Sequence[str] = (), say: Say = print
) -> dict[int, list[int]]:
    """Add tokens to a tokenizer and rows for them to a model.

    Rows beyond the tokenizer's last token, which many models have, are used first. The new rows are to be trained, see
    `hold_rows` and `start_rows`.

    Args:
        special_tokens: those that decoding leaves out where special tokens are skipped.
        say: gets a line about each token that is there already, and one about those that were added.

    Returns:
        The ids of the tokens that were not there, each with the ids that its text had before.
    """
    new: dict[str, Token] = {}
    pieces: dict[int, list[int]] = {}
    for special, names in ((False, tokens), (True, special_tokens)):
        for name in names:
            known, before = token_id(tokenizer, name), tokenizer.encode(name, add_special_tokens=False)
            tokenizer.add_tokens([AddedToken(name, special=special, normalized=False)], special_tokens=special)
            if known is None:
                new[name] = Token(tokenizer.convert_tokens_to_ids(name), special)
                pieces[new[name].id] = [index for index in before if index != tokenizer.unk_token_id]
            else:
                say(f"token {name} is in the vocabulary already (id {known})")
    if new:
        rows = row_count(model)
        resize(model, max(rows, max(pieces) + 1))
        remember(model, new)
        spare, grown = sum(index < rows for index in pieces), row_count(model) - rows
        told = ", ".join(f"{name} {token.id}" for name, token in new.items())
        say(f"added tokens: {told}; {grown} new rows, {spare} unused rows of the base")
    return pieces


def token_id(tokenizer: Any, name: str) -> int | None:
    """The id of the token called `name`, None where there is none."""
    return tokenizer.backend_tokenizer.token_to_id(name)


def check_tokens(tokenizer: Any, tokens: dict[str, Token], place: str) -> None:
    """Raise `AdapterFileError` where an adapter's token has another id, or its id another token, in `tokenizer`."""
    problems = []
    for name, token in tokens.items():
        known, other = token_id(tokenizer, name), tokenizer.backend_tokenizer.id_to_token(token.id)
        if known not in (None, token.id) or other not in (None, name):
            there = f"id {token.id} is '{other}'" if known in (None, token.id) else f"its id is {known}"
            problems.append(f"{place}: token {name} has id {token.id} in the adapter, but in the tokenizer {there}")
    raise_all(AdapterFileError, problems)


def take_tokens(tokenizer: Any, tokens: dict[str, Token], place: str) -> None:
    """Add an adapter's tokens to `tokenizer`, with the ids they have in the adapter.

    Raises:
        AdapterFileError: the tokenizer gives them other ids; each is named.
    """
    check_tokens(tokenizer, tokens, place)
    for name, token in sorted(tokens.items(), key=lambda item: item[1].id):
        if token_id(tokenizer, name) is None:
            tokenizer.add_tokens([AddedToken(name, special=token.special, normalized=False)], token.special)
    check_tokens(tokenizer, tokens, place)


def extend_vocabulary(
    model: Any, tokenizer: Any, data: DataRecipe, init_adapter: Path | None, say: Say
) -> dict[int, list[int]]:
    """Give the tokens that the `data` part of a recipe adds, and those of an adapter that is trained further.

    Returns:
        As `add_tokens`: the tokens that need rows. Those of the adapter have them.

    Raises:
        AdapterFileError: the adapter's tokens have other ids here.
        UsageError: tokens are asked for that the adapter has no rows for.
    """
    if init_adapter:
        stored = read_adapter(init_adapter)[1].get("tokens", {})
        tokens = {name: Token(**token) for name, token in stored.items()}
        take_tokens(tokenizer, tokens, str(init_adapter))
        if tokens:
            resize(model, max(row_count(model), 1 + max(token.id for token in tokens.values())))
    added = add_tokens(model, tokenizer, data.add_tokens or (), data.add_special_tokens or (), say)
    if added and init_adapter:
        raise UsageError(
            f"data.add_tokens: the adapter in {init_adapter} has no rows for "
            f"{', '.join(tokenizer.convert_ids_to_tokens(list(added)))}; leave out --init-adapter, or these tokens"
        )
    return added


# ---- rows that are trained ----


def hold_rows(model: Any, method: Any, config: Any, ids: Sequence[int]) -> int:
    """Let the adapter that `config` describes train the rows `ids`; answer how many numbers that adds.

    Each matrix of the vocabulary counts once: an untied head has rows of its own. A layer that the adapter changes
    as a whole is left to it.

    Raises:
        UsageError: the method cannot hold rows of tokens.
    """
    if not hasattr(config, "trainable_token_indices"):
        raise UsageError(f"{type(config).__name__} cannot hold rows of tokens; take the method lora, or full")
    layers = vocabulary_layers(model)
    covered = {place.path for place in method.plan(model, config) if place.adapter is not TokenRows}
    done = {id(layers[path].weight) for path in covered & layers.keys()}
    embedding = next(path for path, layer in layers.items() if layer is model.get_input_embeddings())
    named, added = by_layer(config.trainable_token_indices, embedding), 0
    for path, layer in layers.items():
        if id(layer.weight) not in done:
            done.add(id(layer.weight))
            name = path.rpartition(".")[2]
            fresh = [index for index in ids if index not in named.get(name, ())]
            named = named | {name: [*named.get(name, ()), *fresh]}
            added += len(fresh) * layer.weight.shape[1]
    # A list is what other tools read too, and means the input embedding and a head that is tied to it.
    config.trainable_token_indices = (
        next(iter(named.values())) if list(named) == [embedding.rpartition(".")[2]] else named
    )
    return added


@torch.no_grad()
def start_rows(model: Any, starts: Mapping[int, Sequence[int]]) -> None:
    """Let the trained rows begin as the mean of the base's rows that each is given; of all of them where that is none.

    With the pieces of the token's text the loss begins lower than with the mean of all rows (docs/tokens.md).
    """
    base_rows = vocabulary_of(model).base_rows
    for layer, adapter in _token_rows(model):
        for place, index in enumerate(adapter.indices.tolist()):
            if index in starts:
                pieces = [piece for piece in starts[index] if piece < base_rows]
                rows = layer.weight[pieces] if pieces else layer.weight[:base_rows]
                adapter.trainable_tokens_delta[place] = rows.float().mean(0).to(adapter.trainable_tokens_delta)


def _token_rows(model: Any) -> Iterator[tuple[Any, TokenRows]]:
    """The trained rows of each adapter, with the layer that they belong to."""
    for layer in vocabulary_layers(model).values():
        for adapter in layer.adapters.values() if isinstance(layer, Adapted) else ():
            if isinstance(adapter, TokenRows):
                yield layer, adapter


def let_adapter_train(
    model: Any, tokenizer: Any, method: Any, config: Any, added: Collection[int], untrained: Sequence[int], say: Say
) -> None:
    """Put rows for the `added` and the `untrained` tokens into the configuration of a new adapter, and say so.

    Raises:
        UsageError: tokens were added, and the method cannot hold their rows.
    """
    if untrained and not hasattr(config, "trainable_token_indices"):
        warn_untrained(tokenizer, untrained, "this method cannot train it; take the method lora, or full", say)
        untrained = []
    if ids := [*added, *untrained]:
        numbers = hold_rows(model, method, config, ids) // len(ids)
        told = f"training it (adds {numbers:,} parameters)" if numbers else "it is trained with the whole embedding"
        warn_untrained(tokenizer, untrained, told, say)


def tell_base_trained(model: Any, tokenizer: Any, added: Collection[int], untrained: Sequence[int], say: Say) -> None:
    """Say what becomes of such tokens where parameters of the base are trained: their rows are part of the model."""
    layers = vocabulary_layers(model)
    if all(layer.weight.requires_grad for layer in layers.values()):
        warn_untrained(tokenizer, untrained, "it is trained with the whole embedding", say)
        return
    names = ", ".join(path.rpartition(".")[2] for path in layers)
    for index in (*added, *untrained):
        name = tokenizer.convert_ids_to_tokens(index)
        say(f"warning: token {name} has an embedding that is not trained; name it in adapter.modules: [{names}]")


def tell_adapter_lacks(model: Any, tokenizer: Any, untrained: Sequence[int], say: Say) -> None:
    """Say which untrained tokens the loaded adapter has no rows for."""
    held = {index for _, adapter in _token_rows(model) for index in adapter.indices.tolist()}
    left = [index for index in untrained if index not in held]
    warn_untrained(tokenizer, left, "the adapter has no row for it; start a new one to train it", say)


def warn_untrained(tokenizer: Any, ids: Sequence[int], what: str, say: Say) -> None:
    for name in tokenizer.convert_ids_to_tokens(list(ids)):
        say(f"warning: token {name} has an untrained embedding in this base; {what}")


# ---- untrained rows ----


def untrained_tokens(model: Any, tokenizer: Any, used: Iterable[int]) -> list[int]:
    """Of the token ids `used`, those of added tokens whose embedding the base never trained."""
    base_rows = vocabulary_of(model).base_rows
    ids = sorted(set(used) & {index for index in tokenizer.added_tokens_decoder if index < base_rows})
    if not ids:
        return []
    spread = getattr(model.config.get_text_config(), "initializer_range", 0.0)
    return untrained_rows(model.get_input_embeddings().weight.detach()[:base_rows], ids, spread)


def untrained_rows(weight: Tensor, ids: Collection[int], spread: float) -> list[int]:
    """Of the rows `ids` of an embedding (V, D), those that look untrained.

    - the row is next to zero, to the mean row, or to another row: rows that are never met are moved alike by every
      step (https://arxiv.org/abs/2405.05417), and new ones are made as zeros or as the mean;
    - or it is random: it lies in no direction that trained rows prefer, and its length is that of a random start of
      standard deviation `spread`, or far from all others. Not judged where most rows are like that, or V < 4 D.
    """
    count, width = weight.shape
    others = [index for index in torch.linspace(0, count - 1, min(count, _SAMPLED)).long().tolist() if index not in ids]
    sample = weight[others or list(ids)].float()
    mean, norms = sample.mean(0), sample.norm(dim=1)
    unit = (sample - mean).norm(dim=1).median()
    rows = weight[list(ids)].float()
    length = rows.norm(dim=1)
    near = torch.minimum(length, (rows - mean).norm(dim=1)) < _NEAR * unit
    for start in range(0, count, _SAMPLED):
        part = weight[start : start + _SAMPLED].float()
        distance = torch.cdist(rows, part, compute_mode="donot_use_mm_for_euclid_dist")
        for place, index in enumerate(ids):
            if start <= index < start + len(part):
                distance[place, index - start] = torch.inf
        near |= distance.min(dim=1).values < _NEAR * unit
    directions = max(1, min(_DIRECTIONS, width // 8))
    with torch.random.fork_rng([weight.device] if weight.is_cuda else []):  # the seed is that of all devices
        torch.manual_seed(0)
        preferred = torch.svd_lowrank(sample / norms.clamp_min(1e-12)[:, None], q=directions)[2]
    # A random row has this share of its squared length in the preferred directions, and hardly ever more.
    most = directions / width + 4 * math.sqrt(2 * directions) / width
    shares = (sample @ preferred).square().sum(1) / norms.square().clamp_min(1e-12)
    if count >= 4 * width and shares.median() > most:
        random = (rows @ preferred).square().sum(1) / length.square().clamp_min(1e-12) < most
        start_length = spread * math.sqrt(width)
        as_started = (length - start_length).abs() < 4 / math.sqrt(2 * width) * start_length
        low, high = norms.quantile(torch.tensor([0.05, 0.95], device=norms.device))
        near |= random & (as_started | (length < 0.75 * low) | (length > high / 0.75))
    return [index for index, found in zip(ids, near.tolist(), strict=True) if found]
