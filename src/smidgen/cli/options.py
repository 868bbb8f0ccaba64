"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

from smidgen.errors import UsageError

# Options of every command that loads an adapter.
Base: TypeAlias = Annotated[str | None, typer.Option(help="The base model, if it is not where the run says.")]
Force: TypeAlias = Annotated[bool, typer.Option("--force", help="Load an adapter onto another base than its own.")]
Rank: TypeAlias = Annotated[int, typer.Option(help="The rank of the LoRA adapter: higher keeps more.")]


def adapter_switch(value: str) -> bool:
    """Whether ``--adapter`` asks for the base alone.

    Raises:
        UsageError: the value is neither "on" nor "off".
    """
    if value not in ("on", "off"):
        raise UsageError(f"--adapter: must be 'on' or 'off', got '{value}'")
    return value == "off"
