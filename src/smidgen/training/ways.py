"""A recipe forecast before its model is there: full tuning, LoRA and QLoRA side by side, and what makes each fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from smidgen.data.templates import choose_template
from smidgen.errors import SmidgenError
from smidgen.models.resolve import resolve_model
from smidgen.models.shapes import Described, describe_model
from smidgen.recipe import Recipe
from smidgen.registry import METHODS
from smidgen.training import objectives
from smidgen.training.devices import Device, find_device
from smidgen.training.memory import give_back, held
from smidgen.training.optimizers import updates_of
from smidgen.training.plan import PREFERRED_TOKENS, Forecast, size_text
from smidgen.training.setup import Say
from smidgen.training.trials import LAYERS, Counted, Growth, count, grow, is_small

REACHED = 0.35  # of a card's FLOP/s: an estimate, of what such trainings come to
_SHORTEST = 128  # tokens: rows are not advised to be cut below
_LOWEST = 4  # rank


def stored_bits(kind: str | None, dtype: torch.dtype, double: bool = True) -> float:
    """Bits of one weight of a linear layer: 4-bit codes share a float32 scale between 64 of them.

    Double quantisation stores these scales in 8 bits, with a float32 for each 256 of them.
    """
    if kind is None:
        return dtype.itemsize * 8
    return 8.0 if kind == "int8" else 4 + (8 / 64 + 32 / (64 * 256) if double else 32 / 64)


@dataclass(frozen=True)
class Rows:
    """What a forecast needs of the data.

    longest: tokens of the longest row. learned: the share of tokens that is. mean: tokens of a row; count: rows; None
    where the data were not read.
    """

    longest: int
    learned: float
    mean: float = 0.0
    count: int | None = None


def read_data(recipe: Recipe, model: Described, say: Say) -> Rows:
    """Tokenise the data as a run does; where that cannot be, each row is as long as it may be, and a line says why."""
    if model.tokenizer is None:
        reason = "there is no tokenizer beside the configuration"
    else:
        try:
            if recipe.data.template:
                model.tokenizer.chat_template = choose_template(model.tokenizer, recipe.data.template, "").text
            train = objectives.read_data(recipe, model.tokenizer, model.stops).train
            learned = float(train.supervised_counts.sum() / max(1, train.lengths.sum()))
            return Rows(int(train.lengths.max()), learned, float(train.lengths.mean()), len(train))
        except SmidgenError as error:
            reason = str(error).splitlines()[0]
    say(f"data: not read ({reason}); rows are taken as data.max_length = {recipe.data.max_length:,} tokens long")
    return Rows(recipe.data.max_length, 1.0)


@dataclass(frozen=True)
class Way:
    """One way to train: a title, and the recipe with that method and base.

    asked: whether it is the recipe's own. changes: what was changed in the recipe for it to fit.
    """

    title: str
    recipe: Recipe
    asked: bool = False
    changes: tuple[str, ...] = ()

    @property
    def trains_base(self) -> bool:
        return hasattr(METHODS[self.recipe.adapter["method"]].load(), "select")


def ways(recipe: Recipe) -> list[Way]:
    """Full tuning, LoRA and QLoRA, each as the recipe asks where it does; its own way, if it is another one."""
    method, kind = recipe.adapter["method"], recipe.quantize
    own = Way(f"{method} {kind or ''}".strip(), recipe, asked=True)
    adapter = {"method": "lora", "target_modules": "all-linear"} if own.trains_base else recipe.adapter
    name = adapter["method"]
    found = [
        Way("full", replace(recipe, adapter={"method": "full"}, quantize=None)),
        Way(name, replace(recipe, adapter=adapter, quantize=None)),
        Way(f"{name} nf4", replace(recipe, adapter=adapter, quantize="nf4")),
    ]
    titles = [way.title for way in found]
    if own.title in titles:
        found[titles.index(own.title)] = own
    else:
        found.append(own)
    return found


class Outlook:
    """Forecasts of ways to train one model on one device. Trials and counts are made once for what they depend on."""

    def __init__(self, model: Described, device: Device, rows: Rows, say: Say):
        self.model, self.device, self.rows = model, device, rows
        self._grown: dict[str, Growth] = {}
        self._counted: dict[str, Counted] = {}
        self._real = device.kind == "cpu" and is_small(model.config)
        if device.kind == "cpu" and not self._real:
            say("the layers of this model are too large to be tried here: activations as in plain PyTorch, no times")
        self._libraries: int | None = device.context

    def forecast(self, way: Way) -> Forecast:
        """The forecast of a way; where the recipe leaves it open, with as many tokens at once as fit."""
        longest = min(self.rows.longest, way.recipe.data.max_length)
        train = way.recipe.train
        budget = max(longest, train.micro_batch_tokens or PREFERRED_TOKENS[self.device.kind])
        while True:
            tokens = max(longest, min(budget, train.batch_size * longest))
            found = self._forecast(way, tokens if way.recipe.data.packing else tokens - tokens % longest)
            if train.micro_batch_tokens or found.fits or budget <= longest:
                return found
            budget = max(longest, budget // 2)

    def _forecast(self, way: Way, tokens: int) -> Forecast:
        grown, train = self._growth(way), way.recipe.train
        libraries = self._measured_libraries()
        counted = self._count(way)
        lived = grown.at(counted.layers, tokens)  # layers below those keep nothing
        bits = stored_bits(way.recipe.quantize, self.device.dtype, way.recipe.double_quantization)
        tile = counted.largest * self.device.dtype.itemsize if way.recipe.quantize else 0
        rows = self.rows.count
        updates = updates_of(train, rows) if rows else 0
        return Forecast(
            weights=int(counted.linear * bits / 8) + counted.other,
            trained=4 * counted.trained,
            gradients=4 * counted.trained,
            optimizer=counted.states[train.optim],
            activations=int(lived.activations) + tile,
            logits=int(lived.logits),
            libraries=libraries,
            loaded=0,
            free=self.device.memory,
            micro_batch_tokens=tokens,
            rate=self._rate(way, counted, grown, tokens),
            tokens=self.rows.mean * train.batch_size * updates if rows else None,
        )

    def _rate(self, way: Way, counted: Counted, grown: Growth, tokens: int) -> float | None:
        """Seconds for each token: measured here, or from a card's FLOP/s."""
        reached = counted.layers / counted.all_layers
        if self._real:
            below = counted.all_layers - counted.layers  # layers that only answer, which is half of what others do
            of_layer = grown.at(LAYERS[1], tokens).seconds - grown.at(LAYERS[0], tokens).seconds
            return (grown.at(counted.layers, tokens).seconds + max(0.0, of_layer) * below / 2) / tokens
        if self.device.flops is None:
            return None
        passes = 1 + reached + (reached if way.recipe.train.gradient_checkpointing else 0)
        of_weights = counted.trained if way.trains_base else 0
        return 2 * (counted.products * passes + of_weights) / (self.device.flops * REACHED)

    def prepare(self, all_ways: list[Way]) -> None:
        """Make the trials of some ways; what the process then holds beside them is what a run's libraries take."""
        for way in all_ways:
            self._growth(way)
        self._measured_libraries()

    def _measured_libraries(self) -> int:
        if self._libraries is None:
            give_back()
            self._libraries = held(torch.device(self.device.kind))
        return self._libraries

    def _growth(self, way: Way) -> Growth:
        train = way.recipe.train
        key = json.dumps([way.recipe.adapter, train.gradient_checkpointing])
        if key not in self._grown:
            wanted = train.micro_batch_tokens or PREFERRED_TOKENS[self.device.kind]
            tokens = max(self.rows.longest, min(wanted, train.batch_size * self.rows.longest))
            rows = self.rows.longest, self.rows.learned
            self._grown[key] = grow(self.model.config, way.recipe, self.device.dtype, rows, tokens, self._real)
        return self._grown[key]

    def _count(self, way: Way) -> Counted:
        key = json.dumps(way.recipe.adapter)
        if key not in self._counted:
            self._counted[key] = count(self.model.config, way.recipe, self.device.dtype)
        return self._counted[key]

    def remedy(self, way: Way) -> Way | None:
        """The way with the cheapest changes of the recipe with which it fits; None: none that are known here do.

        What costs nothing but time comes first, then what costs exactness, then what costs data and capacity. A change
        that turns out not to be needed beside dearer ones is taken back.
        """
        kept: list[_Change] = []
        for options in _changes(self.rows.longest, way):
            for change in options:
                tried = _changed(way, [*kept, change])
                if self.forecast(tried).fits:
                    return _changed(way, self._needed(way, [*kept, change]))
            if options and self.forecast(tried).peak < self.forecast(_changed(way, kept)).peak:
                kept.append(options[-1])
        return None

    def _needed(self, way: Way, changes: list[_Change]) -> list[_Change]:
        for change in changes[-2::-1]:
            fewer = [other for other in changes if other is not change]
            if self.forecast(_changed(way, fewer)).fits:
                changes = fewer
        return changes


@dataclass(frozen=True)
class _Change:
    """A field of a recipe by its path, and its new value."""

    section: str
    name: str
    value: Any

    def __str__(self) -> str:
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return ".".join(filter(None, (self.section, self.name))) + f"={value}"


def _changes(longest: int, way: Way) -> Iterator[list[_Change]]:
    """Changes that need less, the cheapest first; of each kind from the least to the most that it can do."""
    recipe = way.recipe
    train = recipe.train
    if train.micro_batch_tokens:
        yield [_Change("train", "micro_batch_tokens", n) for n in _halves(train.micro_batch_tokens, longest)]
    if not train.gradient_checkpointing:
        yield [_Change("train", "gradient_checkpointing", True)]
    if not way.trains_base and recipe.quantize is None:
        yield [_Change("", "quantize", "nf4")]
    yield [_Change("data", "max_length", n) for n in _halves(min(longest, recipe.data.max_length), _SHORTEST)]
    if train.optim == "adamw":
        yield [_Change("train", "optim", name) for name in ("adamw_8bit", "paged_adamw")]
    if isinstance(rank := recipe.adapter.get("r"), int):
        yield [_Change("adapter", "r", n) for n in _halves(rank, _LOWEST)]


def _halves(value: int, least: int) -> list[int]:
    found = []
    while value > least:
        value = max(least, value // 2)
        found.append(value)
    return found


def _changed(way: Way, changes: list[_Change]) -> Way:
    """A way with changes made."""
    recipe = way.recipe
    for change in changes:
        new = {change.name: change.value}
        if change.section == "train":
            recipe = replace(recipe, train=replace(recipe.train, **new))
        elif change.section == "data":
            recipe = replace(recipe, data=replace(recipe.data, **new))
        elif change.section == "adapter":
            recipe = replace(recipe, adapter=recipe.adapter | new)
        else:
            recipe = replace(recipe, **new)
    return replace(way, recipe=recipe, changes=tuple(map(str, changes)))


@dataclass(frozen=True)
class Plan:
    """What is told about a recipe: the ways with their forecasts, and for those that do not fit a remedy."""

    outlook: Outlook
    found: list[tuple[Way, Forecast, Way | None]]


def outlook_of(recipe: Recipe, device: str | None = None, memory: str | None = None, say: Say = print) -> Plan:
    """Forecast a recipe and its alternatives from the model's configuration.

    Raises:
        UsageError: there is no such device or model, or the adapter's targets are not in it.
    """
    where = find_device(device, memory, recipe.train.dtype)
    model = describe_model(resolve_model(recipe.model, weights=False, say=say))
    rows = read_data(recipe, model, say)
    outlook = Outlook(model, where, rows, say)
    all_ways = ways(recipe)
    outlook.prepare(all_ways)
    found = []
    for way in all_ways:
        forecast = outlook.forecast(way)
        found.append((way, forecast, None if forecast.fits else outlook.remedy(way)))
    return Plan(outlook, found)


def told(way: Way, forecast: Forecast, remedy: Way | None, outlook: Outlook) -> str:
    """One line: whether a way fits, and what makes it fit."""
    room = size_text(forecast.free)
    if forecast.fits:
        return f"{way.title}: fits into {room}"
    if remedy is None:
        alone = size_text(forecast.weights + forecast.trained)
        return f"{way.title}: does not fit into {room}, nor with any change known here; the model alone takes {alone}"
    peak = size_text(outlook.forecast(remedy).peak)
    return f"{way.title}: does not fit into {room}; it does with {' '.join(remedy.changes)} (peak {peak})"
