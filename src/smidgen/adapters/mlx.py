"""LoRA and DoRA in the files of Apple's mlx-lm: ``adapters.safetensors`` and its own ``adapter_config.json``.

There A is `lora_a` (in, R) and B is `lora_b` (R, out), both transposed; `scale` stands for lora_alpha / r; DoRA's
magnitude is `m`. One rank, scale and dropout hold for the whole adapter. `keys` are paths within a
layer, and only layers that are in the file are anything but the base (https://github.com/ml-explore/mlx-lm).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from smidgen.adapters.config import CONFIG_NAME, PeftConfig
from smidgen.adapters.files import KEY_PREFIX, MLX_WEIGHTS_NAME, WEIGHTS_NAME, read_adapter, read_tensors, write_tensors
from smidgen.adapters.methods.lora import LoraConfig
from smidgen.adapters.targets import pattern_value
from smidgen.errors import AdapterFileError, UsageError, raise_all
from smidgen.foreign import contained, parse_json, read_object, shown

_THEIRS = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "m"}
_OURS = {theirs: ours for ours, theirs in _THEIRS.items()}
_KEY = re.compile(rf"{re.escape(KEY_PREFIX)}(?P<path>.+?)\.(?P<name>lora_\w+(?:\.weight)?)")
_IN_LAYER = re.compile(r".*?\.\d+\.(.+)")


def to_mlx(folder: Path, output: Path) -> None:
    """Write the adapter of `folder` for mlx-lm. The old configuration is kept in the new one.

    Raises:
        AdapterFileError: the folder holds no adapter.
        UsageError: it holds what mlx-lm does not have; all of it is named.
    """
    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, LoraConfig):
        raise UsageError(
            f"{folder}: MLX has LoRA and DoRA, not {config.peft_type.lower()}: first make it LoRA (smidgen convert)"
        )
    tensors, metadata = read_adapter(folder)
    converted: dict[str, Tensor] = {}
    left: list[str] = []
    settings: set[tuple[int, float]] = set()
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        name = _THEIRS.get(match["name"], "") if match else ""
        if match is None or not name or tensor.dim() != (1 if name == "m" else 2) or ".experts" in key:
            left.append(key)
            continue
        converted[f"{match['path']}.{name}"] = tensor.T if tensor.dim() == 2 else tensor
        if name == "lora_a":
            alpha = pattern_value(config.alpha_pattern, match["path"], config.lora_alpha)
            settings.add((len(tensor), config.scaling(len(tensor), alpha)))
    problems = [f"{folder}: MLX holds LoRA and DoRA of linear layers, not {', '.join(left[:3])}"] * bool(left)
    if len(settings) > 1:
        problems.append(
            f"{folder}: MLX has one rank and one scale for all layers, not (rank, scale) {sorted(settings)}"
        )
    raise_all(UsageError, problems)
    ((rank, scale),) = settings
    paths = sorted({key.rpartition(".")[0] for key in converted})
    inside = [(path, _IN_LAYER.fullmatch(path)) for path in paths]
    written = {
        "fine_tune_type": "dora" if config.use_dora else "lora",
        "model": config.base_model_name_or_path,
        "num_layers": -1,  # all: what is not in the file stays as the base
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": config.lora_dropout,
            "keys": sorted({match[1] if match else path for path, match in inside}),
        },
        "peft": read_object(contained(folder, CONFIG_NAME, AdapterFileError), AdapterFileError),
    }
    write_tensors(output / MLX_WEIGHTS_NAME, converted, metadata)
    (output / CONFIG_NAME).write_text(json.dumps(written, indent=2), encoding="utf-8")


def from_mlx(folder: Path, output: Path) -> None:
    """Write the adapter of mlx-lm in `folder` as Hugging Face's; if it came from there, with the configuration of then.

    Raises:
        AdapterFileError: the folder holds no adapter of mlx-lm, or one that is no LoRA of linear layers.
    """
    path = contained(folder, CONFIG_NAME, AdapterFileError)
    fields = read_object(path, AdapterFileError)
    parameters = fields.get("lora_parameters")
    kind = fields.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora") or not isinstance(parameters, dict):
        raise AdapterFileError(f"{path}: fine_tune_type {shown(kind)} is none of lora, dora with lora_parameters")
    tensors, texts = read_tensors(contained(folder, MLX_WEIGHTS_NAME, AdapterFileError))
    converted: dict[str, Tensor] = {}
    left = []
    for key, tensor in tensors.items():
        place, _, name = key.rpartition(".")
        if name not in _OURS or tensor.dim() != (1 if name == "m" else 2):
            left.append(key)
            continue
        converted[f"{KEY_PREFIX}{place}.{_OURS[name]}"] = tensor.T if tensor.dim() == 2 else tensor
    ranks = {len(tensor) for key, tensor in converted.items() if key.endswith("lora_A.weight")}
    scale: Any = parameters.get("scale")
    problems = [f"{folder}: not LoRA or DoRA of linear layers: {', '.join(map(shown, left[:3]))}"] * bool(left)
    problems += [f"{folder}: the tensors have ranks {sorted(ranks)}, not one"] * (len(ranks) != 1)
    problems += [f"{path}: lora_parameters.scale is {shown(scale)}, not a number"] * (
        not isinstance(scale, int | float)
    )
    raise_all(AdapterFileError, problems)
    (rank,) = ranks
    config = _restored(fields.get("peft"), rank, scale, kind, str(path))
    if config is None:
        alpha = scale * rank
        config = LoraConfig(
            r=rank,
            lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
            lora_dropout=parameters.get("dropout") or 0.0,
            use_dora=kind == "dora",
            target_modules=sorted({key.removeprefix(KEY_PREFIX).partition(".lora_")[0] for key in converted}),
            task_type="CAUSAL_LM",
            base_model_name_or_path=fields.get("model"),
            inference_mode=True,
            ensure_weight_tying=False,
        ).to_dict()
    write_tensors(output / WEIGHTS_NAME, converted, parse_json(texts.get("smidgen", "{}"), str(path), AdapterFileError))
    (output / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _restored(fields: Any, rank: int, scale: float, kind: str, place: str) -> dict[str, Any] | None:
    """The configuration from before the adapter went to MLX, unless the adapter was changed since."""
    if not isinstance(fields, dict):
        return None
    config = PeftConfig.from_dict(fields, f"{place}: peft")
    if not isinstance(config, LoraConfig):
        return None
    same = config.use_dora == (kind == "dora")
    return fields if same and config.r == rank and config.scaling(rank, config.lora_alpha) == scale else None
