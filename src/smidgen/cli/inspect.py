"""``smidgen inspect``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from smidgen.errors import UsageError


def inspect(
    folder: Annotated[Path, typer.Argument(help="A run folder, an adapter folder, or a model's folder.")],
) -> None:
    """Say what is in a folder, and whether it moves anything."""
    proof = folder / "proof.json"
    inner = next((folder / name for name in ("adapter", "model") if (folder / name).is_dir()), folder)
    if (inner / "adapter_config.json").is_file():
        _show_adapter(inner)
    elif (inner / "config.json").is_file():
        _show_model(inner)
    else:
        raise UsageError(f"{folder}: neither a run, an adapter nor a model: no adapter_config.json and no config.json")
    if proof.is_file():
        for check in json.loads(proof.read_text(encoding="utf-8"))["checks"]:
            typer.echo(f"proof: {'ok  ' if check['passed'] else 'FAIL'} {check['text']}")


def _show_adapter(folder: Path) -> None:
    from collections import defaultdict

    from smidgen.adapters.config import PeftConfig
    from smidgen.adapters.files import KEY_PREFIX, WEIGHTS_NAME, read_adapter
    from smidgen.adapters.targets import count_names

    config = PeftConfig.from_pretrained(folder)
    tensors, metadata = read_adapter(folder)
    defaults = type(config)().to_dict()
    told = {"peft_type", "base_model_name_or_path", "inference_mode", "target_modules"}
    chosen = {key: value for key, value in config.to_dict().items() if key not in told and value != defaults[key]}
    typer.echo(f"method: {config.peft_type.lower()}" + "".join(f", {key} {value}" for key, value in chosen.items()))
    fingerprint = metadata.get("base_fingerprint", "not recorded").partition("-")[0]
    typer.echo(f"base: {config.base_model_name_or_path or 'not named'} (fingerprint {fingerprint})")
    size = (folder / WEIGHTS_NAME).stat().st_size / 1e6
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}))
    typer.echo(
        f"size: {sum(t.numel() for t in tensors.values()):,} numbers in {len(tensors)} tensors, {dtypes}, {size:.1f} MB"
    )
    places: dict[str, list[bool]] = defaultdict(list)
    for key, tensor in tensors.items():
        path = key.removeprefix(KEY_PREFIX)
        for ending in (".weight", ".bias", ".base_layer"):
            path = path.removesuffix(ending)
        module = path.rpartition(".")[0] if path.rpartition(".")[2].startswith(("lora_", "trainable_")) else path
        places[module.removesuffix(".token_adapter")].append(bool(tensor.any()))
    counts = ", ".join(f"{name} x{count}" for name, count in count_names(places).items())
    typer.echo(f"sits at {len(places)} modules: {counts}")
    # An update is a product: where one of its tensors is all zeros it does nothing.
    still = [path for path, nonzero in places.items() if not all(nonzero)]
    typer.echo(
        f"moves: {len(places) - len(still)} of {len(places)} modules" + (f"; still: {still[:3]}" if still else "")
    )


def _show_model(folder: Path) -> None:
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    numbers, files = 0, sorted(folder.glob("*.safetensors"))
    for path in files:
        with safe_open(path, framework="numpy") as file:
            numbers += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    size = sum(path.stat().st_size for path in files) / 1e6
    typer.echo(f"model: {config.get('model_type', 'unknown')}, {numbers:,} numbers, {size:.1f} MB")
    named = {key: config.get(key) for key in ("num_hidden_layers", "hidden_size", "vocab_size", "dtype")}
    typer.echo(", ".join(f"{key} {value}" for key, value in named.items() if value is not None))
