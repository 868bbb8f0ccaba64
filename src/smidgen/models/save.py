"""Writes a model, or the adapter on it, with everything that is needed to use it."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from smidgen.models.load import quiet


def save_complete(model: Any, tokenizer: Any, stops: Iterable[int], folder: Path) -> None:
    """Write what `save_pretrained` of the model writes, its tokenizer, and the tokens that end an answer.

    The folder appears complete, in the place of one that was there.

    Raises:
        OSError: it cannot be written, for example because the disk is full; what was there before is as it was.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    generation = copy.deepcopy(model.generation_config)
    generation.eos_token_id = sorted(stops) or None
    try:
        with quiet():
            model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        generation.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:  # a full disk is either, by which library writes
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{folder}: could not be written: {error}") from error
