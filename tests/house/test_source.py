"""What holds for every source file and every page."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from smidgen.cli.main import COMMANDS
from tests.house.test_floors import FILES, SOURCE, module_of

ROOT = SOURCE.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("module", [module_of(path) for path in FILES if path.name != "__main__.py"])
def test_every_module_imports(module):
    importlib.import_module(module)


def unsafe(tree: ast.AST) -> list[str]:
    """Uses of pickle and of code from outside: ``line: what``."""
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = [node.func.id]
        banned = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "eval", "exec"}
        banned |= {"torch.load", "torch.save", "os.system", "os.popen"}
        found += [f"{node.lineno}: {name}" for name in names if name in banned]
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "shell", "allow_pickle"):
            found += [f"{node.value.lineno}: {node.arg}=True"] * (ast.unparse(node.value) == "True")
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_pickle_no_foreign_code_no_shell(path):
    assert unsafe(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from torch import load",
        "torch.load('x')",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "subprocess.run('ls', shell=True)",
        "eval('1')",
    ],
)
def test_unsafe_code_is_found(code):
    assert unsafe(ast.parse(code))


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_stay_short(path):
    most = 150 if path.parent.name == "methods" else 600
    assert len(path.read_text(encoding="utf-8").splitlines()) <= most


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_links_on_pages_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    for command in re.findall(r"^(?:\$ )?smidgen ([a-z]+)|`smidgen ([a-z]+)", text, flags=re.MULTILINE):
        assert "".join(command) in COMMANDS, f"{page}: smidgen {''.join(command)}"
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), f"{page}: {link}"
