"""What Windows and macOS ask for, as far as Linux can show it: names of files, line ends, encodings, calls."""

from __future__ import annotations

import ast
import io
import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from smidgen.cli.main import main
from smidgen.errors import UsageError
from smidgen.models.resolve import resolve_model
from smidgen.recipe import load_recipe
from smidgen.training import proof, run
from tests.house.test_floors import FILES, module_of
from tests.training.conftest import write_recipe

# ---- calls that are not everywhere, or do not mean the same ----

UNIX_MODULES = {"fcntl", "grp", "pwd", "pty", "termios", "tty", "resource", "syslog", "posix", "multiprocessing"}
UNIX_CALLS = {
    *(f"os.{name}" for name in "fork forkpty rename symlink link kill killpg getuid geteuid uname statvfs".split()),
    *(f"os.{name}" for name in "setsid mkfifo chown getloadavg sched_getaffinity wait waitpid nice".split()),
    *("tempfile.mktemp", "torch.multiprocessing"),
}
SIGNALS = {"SIGINT", "SIGTERM"}


def unportable(tree: ast.AST) -> list[str]:
    """Uses of what Windows lacks, of names joined by slashes, and of text files in an encoding that is not named."""
    found: list[str] = []
    # `os.fork() if hasattr(os, "fork") else ...` asks first
    asked = {
        f"{node.args[0].id}.{node.args[1].value}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "hasattr"
        and isinstance(node.args[0], ast.Name)
        and isinstance(node.args[1], ast.Constant)
    }
    for node in ast.walk(tree):
        bad: list[str] = []
        if isinstance(node, ast.Import):
            bad = [alias.name for alias in node.names if alias.name.partition(".")[0] in UNIX_MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)]
            bad = [name for name in names if name in UNIX_MODULES | UNIX_CALLS]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            if name in UNIX_CALLS - asked or (name.startswith("signal.SIG") and node.attr not in SIGNALS):
                bad = [name]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            bad = [node.value] if node.value.startswith(("/tmp", "/dev/", "/var/", "/proc/")) else []
        elif isinstance(node, ast.Call):
            bad = _bad_call(node)
        found += [f"{getattr(node, 'lineno', 0)}: {each}" for each in bad]
    return found


def _bad_call(call: ast.Call) -> list[str]:
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    named = {keyword.arg for keyword in call.keywords}
    values = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    mode = [each.value for each in values if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    method = isinstance(call.func, ast.Attribute)
    if method and last in ("read_text", "write_text") and "encoding" not in named:
        return [f"{name}() without encoding"]
    opens = name in ("open", "os.fdopen") or (method and last == "open")
    if opens and name != "os.open" and "encoding" not in named and not any("b" in each for each in mode[-1:]):
        return [f"{name}() without encoding"]
    if last in ("symlink_to", "hardlink_to", "rename") and name != "os.rename":
        return [f"{name}()"]
    if last in ("Path", "open"):  # a name put together by hand: Path(f"{folder}/x"), open(folder + "/x")
        return [
            f"{name}() of joined strings"
            for each in call.args
            if isinstance(each, (ast.JoinedStr, ast.BinOp)) and "/" in ast.unparse(each) and not _divides(each)
        ]
    return []


def _divides(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_nothing_that_only_unix_has(path):
    assert unportable(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    [
        "os.fork()",
        "import fcntl",
        "from os import rename",
        "from multiprocessing import Pool",
        "os.rename(a, b)",
        "path.symlink_to(other)",
        "signal.SIGKILL",
        "open('x')",
        "path.open()",
        "path.read_text()",
        "Path(f'{folder}/x')",
        "open(folder + '/x', 'rb')",
        "folder = '/tmp/x'",
        "os.sched_getaffinity(0)",
    ],
)
def test_unportable_code_is_found(code):
    assert unportable(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    ["path.open('rb')", "open(path, mode='wb')", "os.sched_getaffinity(0) if hasattr(os, 'sched_getaffinity') else 1"],
)
def test_portable_code_is_let_through(code):
    assert unportable(ast.parse(code)) == []


# ---- files ----


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(proof, "verify_afresh", lambda folder: [])  # takes seconds; test_offline.py has it


def train(path: Path, *overrides: str) -> Path:
    recipe, _ = load_recipe(path, ["train.max_steps=2", *overrides])
    run.train(recipe, say=lambda line: None)
    return Path(recipe.output)


def smidgen(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["smidgen", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_windows_line_ends_and_byte_order_marks(tmp_path):
    path = write_recipe(tmp_path)
    plain, _ = load_recipe(path)
    first = train(path, f"output={tmp_path / 'first'}")
    for file in (path, tmp_path / "rows.jsonl"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert load_recipe(path)[0] == plain
    second = train(path, f"output={tmp_path / 'second'}")
    logs = [(folder / "log.jsonl").read_text(encoding="utf-8").splitlines() for folder in (first, second)]
    assert [json.loads(line)["loss"] for line in logs[0]] == [json.loads(line)["loss"] for line in logs[1]]


def test_long_names_and_files_that_may_only_be_read(tmp_path, monkeypatch):
    folder = tmp_path.joinpath(*["a long name with spaces, é and 日本 in it"] * 6)
    folder.mkdir(parents=True)
    assert len(str(folder)) > 260
    path = write_recipe(folder)
    for file in (path, folder / "rows.jsonl", *(folder / "base").iterdir()):
        file.chmod(0o444)
    result = train(path)
    assert smidgen(monkeypatch, "merge", result, folder / "merged") == 0
    written = [file for place in (result, folder / "merged") for file in place.rglob("*") if file.is_file()]
    assert written and all(file.stat().st_mode & 0o200 for file in written)  # none inherited that it is read-only


def test_an_output_relative_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    path = write_recipe(tmp_path)
    assert train(path, "output=../other place/run") == Path("../other place/run")
    assert (tmp_path / "other place" / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", ["a" * 300, "rows.jsonl", "rows.jsonl/run", "nul\0character"])
def test_an_output_that_cannot_be_is_told_before_the_model_is_loaded(tmp_path, name):
    path = write_recipe(tmp_path)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8")) | {"output": str(tmp_path / name)}
    path.write_text(json.dumps(recipe | {"model": "never looked at"}), encoding="utf-8")
    with pytest.raises(UsageError, match=r"output: .*cannot be made"):
        train(path)


def test_names_of_windows_are_names_of_files(tmp_path):
    data, model = r"C:\data\rows.jsonl", r"C:\models\llama"
    path = write_recipe(tmp_path)
    recipe, _ = load_recipe(path, [f"data.train={data}", f"model={model}", r"output=D:\runs\first run"])
    assert (recipe.data.train[0].path, recipe.model, recipe.output) == (data, model, r"D:\runs\first run")
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(again)[0] == recipe
    with pytest.raises(UsageError, match=r"C:\\models\\llama: no local folder or file.*no valid hub id"):
        resolve_model(model)


@pytest.mark.skipif(os.name == "nt", reason="there is such a name there")
def test_a_file_of_windows_that_is_missing_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"C:\\data\\rows.jsonl: no such file"):
        train(write_recipe(tmp_path), r"data.train=C:\data\rows.jsonl")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_what_is_told_to_a_pipe_is_utf8_whatever_the_code_page(tmp_path, monkeypatch, encoding):
    path = write_recipe(tmp_path)
    pipe = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", pipe)
    assert smidgen(monkeypatch, "check", path, "data.system=日本 é") == 0
    pipe.flush()
    assert "⟦" in pipe.buffer.getvalue().decode("utf-8")  # type: ignore[attr-defined]
