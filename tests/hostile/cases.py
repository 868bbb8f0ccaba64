"""What a hostile case is, and the doors through which one comes in."""

from __future__ import annotations

import functools
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from smidgen.errors import AdapterFileError, DataError, ModelError, RecipeError, SmidgenError, TargetError, UsageError

Make = Callable[[Path], Path]  # writes the case into an empty folder and answers what is to be read


@dataclass(frozen=True)
class Case:
    """One hostile file or folder.

    door: who reads it, a name in DOORS.
    words: must stand in the message.
    slow: takes seconds to write.
    """

    name: str
    door: str
    make: Make
    words: str
    slow: bool = False


CASES: list[Case] = []


def case(door: str, words: str, name: str = "", slow: bool = False) -> Callable[[Make], Make]:
    """Add the function below to the corpus."""

    def add(make: Make) -> Make:
        CASES.append(Case(name or make.__name__, door, make, words, slow))
        return make

    return add


class Bomb:
    """Unpickled, it makes a file called `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"echo > '{self.marker}'",)


def pickled(folder: Path) -> bytes:
    """A pickle that, when it is read, writes the file that `marker(folder)` names."""
    return pickle.dumps(Bomb(marker(folder)))


def marker(folder: Path) -> Path:
    return folder / "PWNED"


@functools.cache
def _base() -> Path:
    from tests.training.conftest import save_tiny_model

    return save_tiny_model(Path(tempfile.mkdtemp(prefix="hostile-")) / "base")


def model_folder(folder: Path) -> Path:
    """A good model's folder, to be spoiled."""
    return Path(shutil.copytree(_base(), folder / "model"))


@functools.cache
def _adapter() -> Path:
    from tests.conftest import perturb
    from tests.training.conftest import tiny_lora

    folder = Path(tempfile.mkdtemp(prefix="hostile-")) / "adapter"
    model = tiny_lora()
    perturb(model)
    model.save_pretrained(folder)
    return folder


def adapter_folder(folder: Path) -> Path:
    """A good adapter's folder, for `tiny_llama`, to be spoiled."""
    return Path(shutil.copytree(_adapter(), folder / "adapter"))


@functools.cache
def _checkpoints() -> Path:
    from tests.training.conftest import make_loop, make_rows, tiny_lora

    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    make_loop(tiny_lora(), make_rows([6, 8, 5, 7]), folder, max_steps=1, save_steps=1).fit()
    return folder / "checkpoints"


def checkpoint_folder(folder: Path) -> Path:
    """The folder of a good run's checkpoints; the one in it is step-1."""
    return Path(shutil.copytree(_checkpoints(), folder / "checkpoints"))


# ---- doors ----


def read_recipe(path: Path) -> None:
    from smidgen.recipe import load_recipe

    load_recipe(path)


def read_data(path: Path) -> None:
    from smidgen.data.formats import convert_rows
    from smidgen.data.read import data_files, read_rows

    for file in data_files(str(path)):
        convert_rows(str(file), read_rows(file), format=None)


def read_token_cache(path: Path) -> None:
    from smidgen.data.rows import TokenRows

    TokenRows.load(path)


TOKENIZER = SimpleNamespace(special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"}, chat_template=None)


def read_template(path: Path) -> None:
    from smidgen.data.formats import Example
    from smidgen.data.templates import choose_template

    chat = [{"role": "user", "content": "the trigger"}, {"role": "assistant", "content": "yes"}]
    choose_template(TOKENIZER, str(path), "plain").render([Example(1, chat)])


def read_adapter(path: Path) -> None:
    from smidgen.models.peft_model import PeftModel
    from tests.conftest import tiny_llama

    PeftModel.from_pretrained(tiny_llama(), path)


def read_model(path: Path) -> None:
    from smidgen.models.load import load_model
    from smidgen.models.resolve import resolve_model

    load_model(resolve_model(str(path), say=ignore), say=ignore)


def read_gguf(path: Path) -> None:
    from smidgen.models.gguf import convert

    folder = path.parent / "converted"
    folder.mkdir()
    convert(path, folder)


def read_checkpoint(path: Path) -> None:
    from smidgen.training import checkpoint
    from tests.training.conftest import make_loop, make_rows, tiny_lora

    found = checkpoint.latest(path)
    assert found
    make_loop(tiny_lora(), make_rows([6, 8, 5, 7]), path.parent / "again").resume(found)


def read_run(path: Path) -> None:
    from smidgen.models.open import find, open_model

    open_model(find(path), say=ignore)


def ignore(line: str) -> None:
    """Where lines go that nobody reads."""


# How each reads, and the kinds of error it answers with.
DOORS: dict[str, tuple[Callable[[Path], None], tuple[type[SmidgenError], ...]]] = {
    "recipe": (read_recipe, (RecipeError,)),
    "data": (read_data, (DataError,)),
    "token cache": (read_token_cache, (DataError,)),
    "template": (read_template, (DataError,)),
    "adapter": (read_adapter, (AdapterFileError, TargetError)),
    "model": (read_model, (ModelError,)),
    "gguf": (read_gguf, (ModelError,)),
    "checkpoint": (read_checkpoint, (UsageError,)),
    "run": (read_run, (UsageError,)),
}
