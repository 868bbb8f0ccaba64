"""What `chat` and `generate` share."""

from __future__ import annotations

from smidgen.errors import UsageError


def adapter_switch(value: str) -> bool:
    """Whether ``--adapter`` asks for the base alone.

    Raises:
        UsageError: the value is neither "on" nor "off".
    """
    if value not in ("on", "off"):
        raise UsageError(f"--adapter: must be 'on' or 'off', got '{value}'")
    return value == "off"
