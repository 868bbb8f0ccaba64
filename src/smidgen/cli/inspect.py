"""``smidgen inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smidgen.errors import UsageError
from smidgen.foreign import printable, read_object, shown


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
    _show_template(inner)
    if proof.is_file():
        _show_proof(proof)


def _show_proof(path: Path) -> None:
    checks = read_object(path, UsageError).get("checks")
    if not isinstance(checks, list) or not all(isinstance(check, dict) for check in checks):
        raise UsageError(f"{path}: 'checks' must be a list of objects")
    for check in checks:
        typer.echo(f"proof: {'ok  ' if check.get('passed') is True else 'FAIL'} {shown(check.get('text'))}")


def _show_template(folder: Path) -> None:
    """Print the folder's chat templates, and what in them depends on what users write."""
    from smidgen.data.suspicion import suspicious
    from smidgen.models.folder import templates_of

    for origin, text in templates_of(folder).items():
        typer.echo(f"template of {origin}, {len(text):,} characters:")
        for number, line in enumerate(text.splitlines(), 1):
            typer.echo(f"  {number:>4}  {printable(line)}")
        for number, finding in suspicious(text):
            typer.echo(f"look at line {number}: {finding}")


def _show_adapter(folder: Path) -> None:
    from collections import defaultdict

    from smidgen.adapters.config import PeftConfig
    from smidgen.adapters.files import KEY_PREFIX, read_adapter
    from smidgen.adapters.targets import count_names

    config = PeftConfig.from_pretrained(folder)
    tensors, metadata = read_adapter(folder)
    defaults = type(config)().to_dict()
    told = {"peft_type", "base_model_name_or_path", "inference_mode", "target_modules"}
    chosen = {key: value for key, value in config.to_dict().items() if key not in told and value != defaults[key]}
    typer.echo(
        f"method: {config.peft_type.lower()}" + "".join(f", {key} {shown(value)}" for key, value in chosen.items())
    )
    fingerprint = metadata.get("base_fingerprint", "not recorded").partition("-")[0]
    typer.echo(f"base: {config.base_model_name_or_path or 'not named'} (fingerprint {fingerprint})")
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
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
    from smidgen.models.folder import check_documents, read_weights
    from smidgen.models.resolve import resolve_model

    resolve_model(str(folder), say=typer.echo)  # says what is ignored, such as code of its own
    config, tensors = check_documents(folder)["config.json"], read_weights(folder).values()
    numbers, size = sum(tensor.numbers for tensor in tensors), sum(tensor.bytes for tensor in tensors) / 1e6
    typer.echo(f"model: {shown(config.get('model_type', 'unknown'))}, {numbers:,} numbers, {size:.1f} MB")
    named = {key: config.get(key) for key in ("num_hidden_layers", "hidden_size", "vocab_size", "dtype")}
    typer.echo(", ".join(f"{key} {shown(value)}" for key, value in named.items() if value is not None))
