"""Writes a model, or the adapter on it, with everything that is needed to use it."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from smidgen.errors import UsageError
from smidgen.models.images import reader_of
from smidgen.models.load import quiet


def check_empty(folder: Path) -> None:
    """Raise a `UsageError` where a folder that is to be written holds something already."""
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder}: is not empty; name another folder")


def save_complete(
    model: Any, tokenizer: Any, stops: Iterable[int], folder: Path, add: Callable[[Path], None] | None = None
) -> None:
    """Write what `save_pretrained` of the model writes, its tokenizer, and the tokens that end an answer.

    The folder appears complete, in the place of one that was there.

    Args:
        add: writes more into a folder that holds all else.

    Raises:
        OSError: it cannot be written, for example because the disk is full; what was there before is as it was.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    generation = copy.deepcopy(getattr(model, "generation_config", None))  # a classifier has none
    try:
        with quiet():
            model.save_pretrained(partial)
            if reader := reader_of(model):
                reader.save(partial)
        tokenizer.save_pretrained(partial)
        if generation is not None:
            generation.eos_token_id = sorted(stops) or None
            generation.save_pretrained(partial)
        if add:
            add(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:  # a full disk is either, by which library writes
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{folder}: could not be written: {error}") from error
