"""LoRA of experts in the two layouts of files: all experts in one stack, and each expert by itself.

Stacks (`smidgen.adapters.experts`) are what we write: gate and up projection are one parameter. By itself every expert
has keys such as ``mlp.experts.3.gate_proj.lora_A.weight`` (``block_sparse_moe.experts.3.w1`` in Mixtral and kin): files
from before transformers 5, and what servers read. Both ways are exact. Where gate and up have the same A they share it
in the stack, which keeps their rank; else it holds A of both, at twice the rank, and a B of two blocks.

Legend: E experts, R rank.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.adapters.base import base_modules
from smidgen.adapters.files import KEY_PREFIX
from smidgen.adapters.layers import layer_of
from smidgen.adapters.targets import ALL_LINEAR, Pattern, ends_with, find_parameters, names_of, pattern_value, stacks
from smidgen.errors import AdapterFileError, UsageError, raise_all

# What a stack is made of, in its order; the second spelling is that of Mixtral's kin.
_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
_LEAVES = "|".join(leaf for spellings in _PARTS.values() for spelling in spellings for leaf in spelling)
_KEY = re.compile(
    rf"{re.escape(KEY_PREFIX)}(?P<path>.+)\.(?P<expert>\d+)\.(?P<leaf>{_LEAVES})\.lora_(?P<side>[AB])\.weight"
)
_MIXTRAL = ("mixtral", "minimax", "minimax_m2")
_MIXTRAL_BLOCK, _BLOCK = ".block_sparse_moe.", ".mlp."
Factors = tuple[Tensor, Tensor]  # A (E, R, in), B (E, out, R)


def fuse_experts(model: nn.Module, config: Any, tensors: dict[str, Tensor], place: str) -> dict[str, Tensor]:
    """The tensors of a file with every expert by itself as stacks of this model; others as they are.

    `config`, that of the file, is changed to say so.

    Raises:
        AdapterFileError: some experts or projections are missing, or unlike the others in rank or scale.
    """
    counts = {path.rpartition(".")[0]: len(parameter) for path, parameter in stacks(model).items()}
    single: dict[str, dict[str, dict[tuple[str, int], Tensor]]] = defaultdict(lambda: defaultdict(dict))
    rest: dict[str, Tensor] = {}
    renamed = any(_BLOCK in path for path in counts)
    for key, tensor in tensors.items():
        here = key.replace(_MIXTRAL_BLOCK, _BLOCK) if renamed else key
        match = _KEY.fullmatch(here)
        if match and match["path"] in counts:
            single[match["path"]][match["leaf"]][match["side"], int(match["expert"])] = tensor
        else:
            rest[here] = tensor
    others = _adapted(rest)
    if single:
        fused = {path: _parts(leaves, counts[path], f"{place}: {path}") for path, leaves in single.items()}
        settings = _common_settings(config, fused, place)
        blocks = not all(_share_a(parts["gate_up_proj"]) for parts in fused.values() if "gate_up_proj" in parts)
        for path, parts in fused.items():
            for below, own in enumerate(reversed(parts.values())):
                a, b = _joined(list(own.values()), blocks and len(own) > 1)
                prefix = f"{KEY_PREFIX}{path}.{'base_layer.' * below}lora_"
                rest |= {f"{prefix}A.weight": a.flatten(0, 1), f"{prefix}B.weight": b.permute(1, 2, 0).flatten(1)}
        everywhere = fused.keys() == counts.keys()
        names = [f"experts.{n}" for n in settings] if everywhere else [f"{p}.{n}" for p in fused for n in fused[p]]
        config.target_parameters = [*(config.target_parameters or ()), *names]
        by = {name: 2 if blocks and name == "gate_up_proj" else 1 for name in settings}
        _set_patterns(
            config, {f"experts.{n}": (r * by[n], _times(s, by[n], config)) for n, (r, s) in settings.items()}, others
        )
    if rest.keys() != tensors.keys():
        _keep_targets(model, config, others)
    return rest


def split_experts(model: Any, config: Any, tensors: dict[str, Tensor], place: str) -> dict[str, Tensor]:
    """The tensors of a file with stacks, every expert by itself; `config` is changed to say so.

    Raises:
        UsageError: there are no stacks, or not such that are made of gate, up and down projections.
        AdapterFileError: factors are missing, or of another number of experts.
    """
    known, own = stacks(model), find_parameters(model, config.target_parameters or [])
    paths = [f"{path}.{name}" for path, names in own.items() for name in names]
    here = [path for path in paths if path in known]
    odd = [path for path in here if not _is_split(model, path)]
    problems = [] if here else [f"{place}: no experts in it: target_parameters is {config.target_parameters}"]
    problems += [
        f"{place}: {path}: only gate_up_proj and down_proj of (E, out, in) are split by expert" for path in odd
    ]
    raise_all(UsageError, problems)
    rest, found = dict(tensors), {}
    for path, names in own.items():
        for below, name in enumerate(reversed(names)):
            if f"{path}.{name}" in known:
                prefix, count = f"{KEY_PREFIX}{path}.{'base_layer.' * below}lora_", len(known[f"{path}.{name}"])
                a, b = rest.pop(f"{prefix}A.weight", None), rest.pop(f"{prefix}B.weight", None)
                if a is None or b is None or len(a) % count or b.shape[1] != len(a):
                    raise AdapterFileError(f"{place}: {prefix}A and B are no factors of {count} experts")
                found[f"{path}.{name}"] = a.unflatten(0, (count, -1)), b.unflatten(1, (-1, count)).permute(2, 0, 1)
    blocks = all(_in_blocks(factors, config.r) for path, factors in found.items() if path.endswith("gate_up_proj"))
    others, mixtral = _adapted(rest), getattr(model.config, "model_type", "") in _MIXTRAL
    settings, leaves = {}, defaultdict(list)
    for path, factors in found.items():
        module, _, name = path.rpartition(".")
        spelling = _PARTS[name][mixtral]
        by = 2 if blocks and len(spelling) > 1 else 1
        alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
        for leaf, (a, b) in zip(spelling, _separate(factors, len(spelling), by), strict=True):
            settings[rf"experts\.\d+\.{leaf}"] = (a.shape[1], _times(alpha, 1 / by, config))
            for expert in range(len(a)):
                leaves[leaf].append(f"{module}.{expert}.{leaf}")
                key = f"{KEY_PREFIX}{leaves[leaf][-1]}.lora_"
                rest |= {f"{key}A.weight": a[expert], f"{key}B.weight": b[expert]}
    _set_patterns(config, settings, others)
    listed = config.target_modules if isinstance(config.target_modules, list) else names_of(model, sorted(others))
    routers = [path.split(".")[-2] for path in paths if path not in known]
    modules, kinds = [path for path, _ in base_modules(model)], {path.rpartition(".")[2] for path in found}
    everywhere = len(found) == sum(path.rpartition(".")[2] in kinds for path in known)
    for leaf, full in leaves.items():  # a bare name would also mean what other layers call so
        listed = listed + ([leaf] if everywhere and not any(ends_with(p, leaf) for p in modules) else full)
    config.target_modules, config.target_parameters = list(dict.fromkeys([*listed, *routers])), None
    return {key.replace(_BLOCK, _MIXTRAL_BLOCK): tensor for key, tensor in rest.items()} if mixtral else rest


# --- factors ----------------------------------------------------------------------------------------------------


def _parts(leaves: dict[str, dict[tuple[str, int], Tensor]], count: int, place: str) -> dict[str, dict[str, Factors]]:
    """The parameters of one module, each with the factors of its projections, in the stack's order."""
    parts: dict[str, dict[str, Factors]] = {}
    problems = []
    for name, spellings in _PARTS.items():
        spelling = next((one for one in spellings if not leaves.keys().isdisjoint(one)), ())
        for leaf in spelling:
            found = leaves.get(leaf, {})
            wanted = [(side, expert) for side in "AB" for expert in range(count)]
            if missing := sorted({expert for side, expert in wanted if (side, expert) not in found}):
                problems.append(
                    f"{place}: no {leaf} of experts {missing[:8]}; one stack holds all {count}, with {spelling}"
                )
            elif len({tensor.shape for (side, _), tensor in found.items() if side == "A"}) > 1:
                problems.append(f"{place}: {leaf}: the experts have unlike ranks")
            else:
                a, b = (torch.stack([found[side, expert] for expert in range(count)]) for side in "AB")
                parts.setdefault(name, {})[leaf] = (a, b)
    raise_all(AdapterFileError, problems)
    return parts


def _joined(parts: list[Factors], blocks: bool) -> Factors:
    """One stack of several projections: with the A that they share, or with A of each and B in blocks."""
    if not blocks:
        return parts[0][0], torch.cat([b for _, b in parts], dim=1)
    a = torch.cat([a for a, _ in parts], dim=1)
    return a, torch.stack([torch.block_diag(*of_expert) for of_expert in zip(*(b for _, b in parts), strict=True)])


def _separate(factors: Factors, count: int, by: int) -> list[Factors]:
    """What `_joined` made one: `count` projections, of which each has one rank in `by`."""
    a, b = factors
    rows = b.chunk(count, dim=1)
    if by == 1:
        return [(a, row) for row in rows]
    return [(a.chunk(by, dim=1)[i], row.chunk(by, dim=2)[i]) for i, row in enumerate(rows)]


def _share_a(parts: dict[str, Factors]) -> bool:
    first, *others = (a for a, _ in parts.values())
    return all(torch.equal(first, other) for other in others)


def _in_blocks(factors: Factors, r: int) -> bool:
    """Whether a stack was made of two projections of rank r with an A each."""
    a, b = factors
    if a.shape[1] != 2 * r:
        return False
    return not b[:, : b.shape[1] // 2, r:].any() and not b[:, b.shape[1] // 2 :, :r].any()


# --- the configuration ------------------------------------------------------------------------------------------


def _common_settings(config: Any, fused: dict[str, dict[str, dict[str, Factors]]], place: str) -> dict[str, Any]:
    """Rank and lora_alpha of each parameter's projections, which must be the same in all layers."""
    values: dict[str, set[tuple[int, float]]] = defaultdict(set)
    for path, parts in fused.items():
        for name, own in parts.items():
            for leaf, (a, _) in own.items():
                alpha = pattern_value(config.alpha_pattern, f"{path}.0.{leaf}", config.lora_alpha)
                values[name].add((a.shape[1], alpha))
    unlike = {name: sorted(found) for name, found in values.items() if len(found) > 1}
    raise_all(
        AdapterFileError,
        [
            f"{place}: {name}: one rank and one lora_alpha fit into a stack, not {found}"
            for name, found in unlike.items()
        ],
    )
    return {name: found.pop() for name, found in values.items()}


def _set_patterns(config: Any, settings: dict[str, tuple[int, float]], others: set[str]) -> None:
    """Write ranks and alphas of experts, in place of all patterns that were about them alone."""
    for field, own, index in (("rank_pattern", "r", 0), ("alpha_pattern", "lora_alpha", 1)):
        kept = {
            pattern: value
            for pattern, value in getattr(config, field).items()
            if any(pattern_value({pattern: True}, path, False) for path in others)
        }
        new = {pattern: values[index] for pattern, values in settings.items() if values[index] != getattr(config, own)}
        setattr(config, field, new | kept)


def _keep_targets(model: nn.Module, config: Any, others: set[str]) -> None:
    """Leave in `target_modules` what is still a layer; a router that is one no longer is named as a parameter."""
    wanted = config.target_modules
    if isinstance(wanted, str):
        if wanted != ALL_LINEAR and not any(map(Pattern(wanted, "target_modules").matches, others)):
            config.target_modules = []
        return
    kept = [name for name in wanted or () if any(ends_with(path, name) for path in others)]
    layers = [path for path in others if layer_of(model.get_submodule(path)) is not None]
    config.target_modules = [name for name in kept if any(ends_with(path, name) for path in layers)]
    routers = [f"{name}.weight" for name in kept if name not in config.target_modules]
    config.target_parameters = [*(config.target_parameters or ()), *routers] or None


def _adapted(keys: Iterable[str]) -> set[str]:
    """The paths of the modules that LoRA's keys are about."""
    return {key.removeprefix(KEY_PREFIX).partition(".lora_")[0] for key in keys if ".lora_" in key}


def _times(alpha: float, by: float, config: Any) -> float:
    """The lora_alpha that keeps the scale when the rank is `by` times as large."""
    scaled = alpha * (math.sqrt(by) if config.use_rslora else by)
    return int(scaled) if scaled == int(scaled) else scaled


def _is_split(model: nn.Module, path: str) -> bool:
    module, _, name = path.rpartition(".")
    return name in _PARTS and not getattr(model.get_submodule(module), "is_transposed", False)
