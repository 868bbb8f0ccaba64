"""Which modules and parameters of a model an adapter acts on; every name and pattern must match something."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import chain
from typing import Any

import regex
from torch import nn

from smidgen.adapters.base import base_modules
from smidgen.adapters.config import TASK_HEADS
from smidgen.adapters.layers import is_linear, layer_of
from smidgen.errors import TargetError, did_you_mean, raise_all
from smidgen.foreign import shown

ALL_LINEAR = "all-linear"
_PATTERN_SECONDS = 1.0  # for all paths that take longer than an honest expression does
_HONEST_SECONDS = 0.0002
_MOST_REPEATS = 1000  # all counts of an expression, such as {3}, multiplied
_COUNTS = re.compile(r"[{,]\s*(\d+)(?=\s*[,}])")
_LONGEST_PATTERN = 10_000  # characters
# What the projections of an expert are called where every expert is a module of its own.
_PROJECTIONS = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
# How the numbered list of layers is called in a path: "model.layers.3.self_attn", "transformer.h.3.attn".
_LAYER_INDEX = re.compile(r"(?:^|\.)(?P<list>[^.]+)\.(?P<index>\d+)\.")


def ends_with(path: str, name: str) -> bool:
    """Whether the module path is `name` or ends with it, at a dot."""
    return path == name or path.endswith(f".{name}")


def find_targets(model: nn.Module, config: Any, accepts: Callable[[Any], bool] | None = None) -> list[str]:
    """The paths of the modules that `config` asks to adapt, in the model's order.

    Reads `target_modules` (None or ``"all-linear"``: every linear layer but the head; a string: a regular
    expression that matches the whole path; a list: names that a path ends with), `exclude_modules` (likewise),
    `layers_to_transform` with `layers_pattern`, and leaves out what lies in `modules_to_save` or the task's head. Of a
    model that takes images, ``"all-linear"`` means the language half, and the names of its layers take its place in
    `config`.

    Args:
        accepts: what can be adapted; by default every kind of layer.

    Raises:
        TargetError: a name matches nothing or something that cannot be adapted; the real names are listed.
    """
    wanted = ALL_LINEAR if config.target_modules is None else config.target_modules
    modules = {path: module for path, module in base_modules(model) if path}
    modules = {path: m for path, m in modules.items() if not is_copied(path, config)}
    problems = []
    if wanted == ALL_LINEAR:
        heads, half = _heads(model), language_half(model)
        linear = {p: m for p, m in modules.items() if is_linear(m) and p.startswith(half)}
        chosen = [p for p, m in linear.items() if m not in heads and not is_bypassed(model, p)]
        if half:
            config.target_modules = names_of(model, chosen)  # other tools take "all-linear" for the whole model
    elif isinstance(wanted, str):
        pattern = Pattern(wanted, "target_modules")
        chosen = [path for path in modules if pattern.matches(path)]
        if not chosen:
            problems.append(f"target_modules: '{wanted}' matches 0 modules.{_available(modules)}{experts_told(model)}")
    else:
        names = set(wanted)
        chosen = [path for path in modules if not names.isdisjoint(_endings(path))]
        missing = _unmatched("target_modules", sorted(names), modules)
        partly = sorted(names & _PROJECTIONS) if not getattr(config, "target_parameters", None) else []
        if missing:
            missing[-1] += experts_told(model)
        elif partly and stacks(model):
            warnings.warn(
                f"target_modules: {', '.join(partly)}: of layers outside the experts only.{experts_told(model)}",
                stacklevel=2,
            )
        problems += missing
    chosen, layer_problems = _in_layers(chosen, config)
    problems += layer_problems
    chosen, excluded = _exclude(chosen, config)
    for path in chosen:
        if accepts is not None and not accepts(modules[path]):
            problems.append(f"target_modules: '{path}' is a {type(modules[path]).__name__} with nothing to train")
        elif accepts is None and layer_of(modules[path]) is None:
            problems.append(
                f"target_modules: '{path}' is a {type(modules[path]).__name__}; name the layers in it "
                f"(linear, embedding or convolution){_children(modules, path)}"
            )
        elif is_bypassed(model, path):
            problems.append(
                f"target_modules: '{path}' is never called; its parent reads the weight, so an adapter is idle"
            )
    if not chosen and not problems:
        reason = f"exclude_modules leaves none of {excluded}" if excluded else "no linear layer was found"
        problems.append(f"target_modules: 0 modules to adapt: {reason}.{_available(modules)}")
    raise_all(TargetError, problems)
    return chosen


def find_named(model: nn.Module, names: Iterable[str], field: str, at_dot: bool = True) -> list[str]:
    """The paths of all modules that end with one of `names`.

    Args:
        at_dot: the name must be whole; False: "norm" also finds "input_layernorm", as files written with
            `modules_to_save` mean it.

    Raises:
        TargetError: a name matches nothing.
    """
    modules = {path: module for path, module in base_modules(model) if path}
    names = list(names)
    matches = ends_with if at_dot else str.endswith
    raise_all(TargetError, _unmatched(field, names, modules, matches))
    return [path for path in modules if any(matches(path, name) for name in names)]


def stacks(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that hold the weights of all experts of a module, (E, out, in) or (E, in, out), by path."""
    return {
        f"{path}.{name}": parameter
        for path, module in base_modules(model)
        if path and layer_of(module) is None and isinstance(getattr(module, "num_experts", None), int)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and parameter.shape[0] == module.num_experts
    }


def short_name(path: str) -> str:
    """The last two names of a parameter's path, such as "experts.gate_up_proj"."""
    return ".".join(path.split(".")[-2:])


def experts_told(model: nn.Module) -> str:
    """What `target_parameters` can say to adapt the model's experts, with counts; "" where it has none."""
    counts = Counter(map(short_name, stacks(model)))
    told = ", ".join(f"{name} x{count}" for name, count in counts.items())
    return f" The experts are parameters, for target_parameters: {told}." if told else ""


def find_parameters(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """The parameters whose path ends with one of `names`: module path -> their names, in the module's order.

    Raises:
        TargetError: a name matches nothing, or something that is no matrix and no stack of matrices.
    """
    known = {
        f"{path}.{name}": parameter
        for path, module in base_modules(model)
        if path
        for name, parameter in module.named_parameters(recurse=False)
    }
    names = list(names)
    near = {ending for path in stacks(model) for ending in (short_name(path), path.rpartition(".")[2])}
    problems = [
        f"target_parameters: '{shown(name)}' matches 0 parameters{did_you_mean(name, near) or '.'}{experts_told(model)}"
        for name in names
        if not any(ends_with(path, name) for path in known)
    ]
    found: dict[str, list[str]] = {}
    for path, parameter in known.items():
        if any(ends_with(path, name) for name in names):
            if parameter.dim() not in (2, 3):
                problems.append(f"target_parameters: '{path}' is neither a matrix nor a stack: {list(parameter.shape)}")
            module, _, leaf = path.rpartition(".")
            found.setdefault(module, []).append(leaf)
    raise_all(TargetError, problems)
    return found


def names_of(model: nn.Module, paths: list[str]) -> list[str]:
    """The names, as a configuration lists them, that exactly the modules at `paths` end with."""
    by_name: dict[str, set[str]] = {}
    for path, _ in base_modules(model):
        by_name.setdefault(path.rpartition(".")[2], set()).add(path)
    last = {path: path.rpartition(".")[2] for path in paths}
    return list(dict.fromkeys(name if by_name[name] <= last.keys() else path for path, name in last.items()))


def pattern_value(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of `path` itself, or of the first pattern (a regular expression for the end of a path) that matches."""
    if path in patterns:
        return patterns[path]
    for pattern, value in patterns.items():
        if _ending(pattern, "pattern").matches(path):
            return value
    return default


def check_patterns(patterns: Mapping[str, Any], paths: list[str], field: str) -> list[str]:
    """A line for each pattern that matches none of the adapted modules."""
    lines = []
    for pattern in patterns:
        try:
            if not any(map(_ending(pattern, field).matches, paths)):
                names = Counter(path.rpartition(".")[2] for path in paths)
                lines.append(
                    f"{field}: '{shown(pattern)}' matches none of the adapted modules{did_you_mean(pattern, names)}"
                )
        except TargetError as error:
            lines.append(str(error))
    return lines


def count_names(paths: Iterable[str]) -> dict[str, int]:
    """How often each last name of a path occurs, most first: what "q_proj x30" is printed from."""
    return dict(Counter(path.rpartition(".")[2] for path in paths).most_common())


def language_half(model: Any) -> str:
    """How the paths of the language half of a model that takes images begin; an empty text for any other model."""
    if not hasattr(getattr(model, "config", None), "vision_config"):
        return ""
    decoder = model.get_decoder()
    return next((f"{path}." for path, module in base_modules(model) if path and module is decoder), "")


def _heads(model: nn.Module) -> set[nn.Module]:
    """The layers that turn hidden states into the answer: not adapted by ``all-linear``."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    named = [getattr(model, name, None) for name in ("lm_head", *chain.from_iterable(TASK_HEADS.values()))]
    return {part for head in (output, *named) if head is not None for part in head.modules()}


def is_bypassed(model: nn.Module, path: str) -> bool:
    """Whether the parent computes with the weight itself and never calls the module."""
    parent = path.rpartition(".")[0]
    return isinstance(model.get_submodule(parent), nn.MultiheadAttention)


def is_copied(path: str, config: Any) -> bool:
    """Whether the module lies in one that is trained in full beside the method: named, or the head of a task."""
    return any(_inside(path, name) for name in (*(config.modules_to_save or ()), *TASK_HEADS.get(config.task_type, ())))


def _inside(path: str, name: str) -> bool:
    return ends_with(path, name) or f".{name}." in f".{path}."


class Pattern:
    """A regular expression for whole paths of modules. A hostile one may take for ever: its time is bounded.

    Raises:
        TargetError: it is not a regular expression.
    """

    def __init__(self, text: str, field: str) -> None:
        self._place, self._left = f"{field}: '{shown(text)}'", _PATTERN_SECONDS
        if len(text) > _LONGEST_PATTERN:
            raise TargetError(f"{self._place} is longer than {_LONGEST_PATTERN:,} characters")
        counts = [int(count) for count in _COUNTS.findall(text) if len(count) < 9]
        if math.prod(count or 1 for count in counts) > _MOST_REPEATS or re.search(r"\d{9}", text):
            raise TargetError(f"{self._place} repeats more than {_MOST_REPEATS:,} times; write it simpler")
        try:
            re.compile(text)  # Python's own rules; only the matching, which can be stopped, is regex's
            self._compiled = regex.compile(text)
        except (re.error, regex.error, ValueError, RecursionError, OverflowError, MemoryError) as error:
            raise TargetError(f"{self._place} is not a regular expression: {error}") from error

    def matches(self, path: str) -> bool:
        """Whether the whole path matches.

        Raises:
            TargetError: the paths so far took more time than any honest expression.
        """
        begin = time.perf_counter()
        try:
            return self._compiled.fullmatch(path, timeout=max(0.001, self._left)) is not None
        except TimeoutError:
            raise TargetError(f"{self._place} takes too long to match; write it simpler, or list the names") from None
        finally:
            taken = time.perf_counter() - begin
            self._left -= taken if taken > _HONEST_SECONDS else 0


@lru_cache(maxsize=1024)
def _ending(pattern: str, field: str) -> Pattern:
    """A pattern for the end of a path, at a dot."""
    return Pattern(rf"(?:.*\.)?(?:{pattern})", field)


def _endings(path: str) -> Iterator[str]:
    """All names that the path ends with, at a dot: "a.b.c" with "c", "b.c" and "a.b.c"."""
    parts = path.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _unmatched(
    field: str, names: list[str], modules: Mapping[str, nn.Module], matches: Callable[[str, str], bool] = ends_with
) -> list[str]:
    whole = {ending for path in modules for ending in _endings(path)}
    missing = [name for name in names if name not in whole and not any(matches(path, name) for path in modules)]
    known = {path.rpartition(".")[2] for path in modules if not path.rpartition(".")[2].isdigit()}
    lines = [f"{field}: '{shown(name)}' matches 0 modules{did_you_mean(name, known) or '.'}" for name in missing[:50]]
    if len(missing) > 50:
        lines.append(f"{field}: {len(missing) - 50:,} more names match 0 modules.")
    if lines:
        lines[-1] += _available(modules)
    return lines


def _available(modules: Mapping[str, nn.Module]) -> str:
    linear = count_names(path for path, module in modules.items() if is_linear(module))
    other = count_names(p for p, module in modules.items() if layer_of(module) is not None and not is_linear(module))
    lines = [("linear layers", linear), ("other layers", other)]
    listed = [f"{kind}: " + ", ".join(f"{name} x{n}" for name, n in counts.items()) for kind, counts in lines if counts]
    return f" Available {'; '.join(listed)}."


def _children(modules: Mapping[str, nn.Module], path: str) -> str:
    below = [p for p, m in modules.items() if p.startswith(f"{path}.") and layer_of(m) is not None]
    return ": " + ", ".join(count_names(below)) if below else ""


def _in_layers(paths: list[str], config: Any) -> tuple[list[str], list[str]]:
    layers, pattern = config.layers_to_transform, config.layers_pattern
    if layers is None:
        problem = "layers_pattern: names layers only together with layers_to_transform"
        return paths, [problem] if pattern else []
    if isinstance(config.target_modules, str) and config.target_modules != ALL_LINEAR:
        return paths, [
            "layers_to_transform: a target_modules pattern says the layers itself; give target_modules a list"
        ]
    wanted = {layers} if isinstance(layers, int) else set(layers)
    lists = {pattern} if isinstance(pattern, str) else set(pattern or ())
    chosen, seen = [], set()
    for path in paths:
        for match in _LAYER_INDEX.finditer(path):
            if not lists or match["list"] in lists:
                seen.add(int(match["index"]))
                if int(match["index"]) in wanted:
                    chosen.append(path)
                break
    missing = sorted(wanted - seen)
    there = f"layers {min(seen)} to {max(seen)}" if seen else "no numbered layers"
    return chosen, [f"layers_to_transform: no layer {i} holds a target; there are {there}" for i in missing]


def _exclude(paths: list[str], config: Any) -> tuple[list[str], list[str]]:
    exclude = config.exclude_modules
    if not exclude:
        return paths, []
    if isinstance(exclude, str):
        pattern = Pattern(exclude, "exclude_modules")
        excluded = [path for path in paths if pattern.matches(path)]
    else:
        excluded = [path for path in paths if not set(exclude).isdisjoint(_endings(path))]
        unused = [name for name in exclude if not any(ends_with(path, name) for path in paths)]
        raise_all(TargetError, [f"exclude_modules: '{name}' matches none of the target modules" for name in unused])
    return [path for path in paths if path not in set(excluded)], excluded
