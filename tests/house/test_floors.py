"""A module imports only from lower floors, and within one floor only from its own room."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import smidgen

SOURCE = Path(smidgen.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

FLOORS = {
    **dict.fromkeys("errors foreign safetensors_header proofs drafts registry checking threads".split(), 0),
    **dict.fromkeys(("llamafactory_keys", "llamafactory", "recipe_parts", "contradictions", "recipe", "flow"), 0),
    **dict.fromkeys(("losses", "quant", "kernels"), 1),
    **dict.fromkeys(("adapters", "data"), 2),
    **dict.fromkeys(("models",), 3),
    **dict.fromkeys(("training", "evaluation", "export"), 4),
    **dict.fromkeys(("cli", "server", "board"), 5),
    "__main__": 6,
}
# (room, library or other room): why this room may import what a floor or a room keeps to itself.
EXCEPTIONS: dict[tuple[str, str], str] = {("quant", "kernels"): "a kernel makes stored weights dense"}


def room_of(module: str) -> str:
    return (module.split(".") + [""])[1]


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, wherever the import stands, with its line."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            name = ".".join([*above, *([node.module] if node.module else [])])
            whole = name in ("smidgen", "smidgen.cli")  # `from smidgen import recipe` imports smidgen.recipe
            yield from (
                (node.lineno, f"{name}.{alias.name}" if whole else name) for alias in node.names[: None if whole else 1]
            )


def breaches(path: Path) -> Iterator[str]:
    """What a file imports against the floors, as ``file:line: importing room -> imported room``."""
    if path == SOURCE / "__init__.py":
        return  # its names are resolved on first use; test_start.py holds that nothing is imported before
    room = room_of(module_of(path))
    for line, name in imports(path):
        top, other = name.partition(".")[0], room_of(name)
        place = f"{path.relative_to(SOURCE.parent)}:{line}"
        if top == "smidgen" and other in FLOORS:
            above, below = FLOORS[room], FLOORS[other]
            same_floor = above == below and room != other and above > 0 and (room, other) not in EXCEPTIONS
            if below > above or same_floor:
                yield f"{place}: {room} (floor {above}) -> {other} (floor {below})"
        elif top in ("torch", "accelerate") and FLOORS[room] == 0 and (room, top) not in EXCEPTIONS:
            yield f"{place}: {room} (floor 0) -> {top}"
        elif top == "transformers" and room != "models" and (room, top) not in EXCEPTIONS:
            yield f"{place}: {room} -> transformers, which models alone knows"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_follow_the_floors(path: Path):
    if path != SOURCE / "__init__.py":
        assert room_of(module_of(path)) in FLOORS, f"{path}: a new room or module needs a floor in {__file__}"
    assert not list(breaches(path))


@pytest.mark.parametrize(
    ("room", "code", "breach"),
    [
        ("losses", "from smidgen.adapters import base", "losses (floor 1) -> adapters (floor 2)"),
        ("adapters", "import smidgen.data.read", "adapters (floor 2) -> data (floor 2)"),
        ("data", "def f():\n    from smidgen import models", "data (floor 2) -> models (floor 3)"),
        ("adapters/methods", "from ...models import load", "adapters (floor 2) -> models (floor 3)"),
        ("training", "from transformers import AutoModel", "training -> transformers"),
        ("recipe", "import torch.nn", "recipe (floor 0) -> torch"),
        ("kernels", "from smidgen.quant import codes", "kernels (floor 1) -> quant (floor 1)"),
        ("quant", "from smidgen.kernels import dequantize", ""),
        ("adapters/methods", "from ..base import Adapter\nfrom smidgen.losses import lm\nimport torch", ""),
        ("models", "import transformers\nfrom smidgen.adapters import base", ""),
    ],
)
def test_a_breach_is_found_with_its_line(tmp_path, monkeypatch, room, code, breach):
    monkeypatch.setitem(globals(), "SOURCE", tmp_path / "smidgen")
    path = tmp_path / "smidgen" / (f"{room}.py" if room == "recipe" else f"{room}/new.py")
    path.parent.mkdir(parents=True)
    path.write_text(code, encoding="utf-8")
    found = list(breaches(path))
    if not breach:
        assert found == []
    else:
        assert len(found) == 1 and breach in found[0]
        assert f"{path.name}:{code.count(chr(10)) + 1}: " in found[0]
