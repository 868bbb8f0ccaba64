"""Hostile folders and weights: adapters, models, GGUF files, checkpoints, runs."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.cases import adapter_folder, case, checkpoint_folder, model_folder, pickled

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def edit_json(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None takes one out."""
    document = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in document.items() if value is not None}))


def split_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_safetensors(header: dict[str, Any] | bytes, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


# ---- safetensors: the same lies in an adapter, a model and a checkpoint ----


def _entry(header: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in header.items() if name != "__metadata__")


def _spoiled(**fields: Any) -> Callable[[bytes], bytes]:
    def spoil(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        _entry(header).update(fields)
        return join_safetensors(header, data[8 + length :])

    return spoil


def _twice(data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name, entry = next((name, entry) for name, entry in header.items() if name != "__metadata__")
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
    return join_safetensors(text.encode(), data[8 + length :])


LIES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "header of 10 GB": (lambda data: struct.pack("<Q", 10 * 2**30) + data[8:], "the header would be 10,737,418,240"),
    "header of 2^64 bytes": (lambda data: b"\xff" * 8 + data[8:], "the header would be"),
    "empty": (lambda data: b"", "cut off"),
    "seven bytes": (lambda data: data[:7], "cut off"),
    "half of the header": (lambda data: data[:100], "cut off"),
    "half of the tensors": (lambda data: data[:-100], "cut off"),
    "more than the tensors": (lambda data: data + b"x" * 100, "cut off or holds more"),
    "header not JSON": (lambda data: join_safetensors(b"{" + b"x" * 100, b""), "not valid JSON"),
    "header a list": (lambda data: join_safetensors(b"[]", b""), "not a JSON object"),
    "header not UTF-8": (lambda data: join_safetensors(b'{"\xff": 1}', b""), "not valid JSON"),
    "deep header": (lambda data: join_safetensors(b'{"a":' * 100_000, b""), "nested too deeply"),
    "a name twice": (_twice, "given twice"),
    "overlapping": (_spoiled(data_offsets=[0, 4], shape=[1]), "begins at byte"),
    "past the end": (_spoiled(data_offsets=[0, 2**40], shape=[2**38]), "begins at byte"),
    "backwards": (_spoiled(data_offsets=[100, 0]), "does not fill"),
    "negative shape": (_spoiled(shape=[-1, -4]), "list of counts"),
    "a shape of 2^120": (_spoiled(shape=[2**60, 2**60]), "does not fill"),
    "unknown dtype": (_spoiled(dtype="OBJECT"), "unknown dtype"),
    "a dtype that is a list": (_spoiled(dtype=["F32"]), "unknown dtype"),
    "offsets of text": (_spoiled(data_offsets="0,4"), "two counts"),
    "no shape": (_spoiled(shape=None), "list of counts"),
    "entries of text": (lambda data: join_safetensors({"a": "b"}, b""), "unknown dtype"),
    "metadata of lists": (lambda data: join_safetensors({"__metadata__": {"format": []}}, b""), "__metadata__"),
}
PLACES = {
    "adapter": (adapter_folder, ADAPTER),
    "model": (model_folder, "model.safetensors"),
    "checkpoint": (checkpoint_folder, "step-1/optimizer.safetensors"),
}


def _lie(door: str, name: str) -> None:
    change, words = LIES[name]
    make, file = PLACES[door]

    def write(folder: Path) -> Path:
        spoiled = make(folder)
        path = spoiled / file
        path.write_bytes(change(path.read_bytes()))
        return spoiled

    case(door, words, f"{door}: {name}")(write)


for _name in LIES:
    _lie("adapter", _name)
for _door in ("model", "checkpoint"):
    for _name in ("header of 10 GB", "half of the tensors", "overlapping", "a name twice", "header not JSON"):
        _lie(_door, _name)


def _pickle(door: str, make: Callable[[Path], Path], weights: str, name: str, words: str) -> None:
    def write(folder: Path) -> Path:
        spoiled = make(folder)
        (spoiled / weights).unlink()
        (spoiled / name).write_bytes(pickled(folder))
        return spoiled

    case(door, words, f"{door}: pickle {name}")(write)


for _name in ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.ckpt"):
    _pickle("adapter", adapter_folder, ADAPTER, _name, "refused unread: a pickle can run code")
for _name in ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "training_args.bin"):
    _pickle("model", model_folder, "model.safetensors", _name, "refused: a pickle file can run any code")
_pickle("adapter", adapter_folder, ADAPTER, ADAPTER, "not a readable safetensors file")
_pickle("adapter", adapter_folder, CONFIG, CONFIG, "not UTF-8")
_pickle("model", model_folder, "model.safetensors", "model.safetensors", "not a readable safetensors file")
_pickle("model", model_folder, "config.json", "config.json", "not UTF-8")
_pickle("model", model_folder, "tokenizer.json", "tokenizer.json", "tokenizer")
_pickle("checkpoint", checkpoint_folder, "step-1/weights.safetensors", "step-1/weights.safetensors", "not a readable")
_pickle("checkpoint", checkpoint_folder, "step-1/state.json", "step-1/state.json", "not UTF-8")

for _name in ("weights.bin", "weights.pt", "weights.pth", "weights.ckpt", "weights.pkl"):

    def _file(folder: Path, name: str = _name) -> Path:
        (folder / name).write_bytes(pickled(folder))
        return folder / name

    case("model", "refused: a pickle file can run any code", f"model: {_name} alone")(_file)


# ---- adapter_config.json ----


def _config(name: str, words: str, **fields: Any) -> None:
    def write(folder: Path) -> Path:
        spoiled = adapter_folder(folder)
        edit_json(spoiled / CONFIG, **fields)
        return spoiled

    case("adapter", words, f"adapter_config: {name}")(write)


_SLOW = "(.+)" * 12 + "".join(f"\\{number}" for number in range(12, 0, -1))
_config("r of a billion", "r: must be a whole number from 1 to 65536, got 1000000000", r=10**9)
_config("r of -1", "r: must be a whole number from 1 to 65536", r=-1)
_config("r of 0", "r: must be a whole number from 1 to 65536", r=0)
_config("r of text", "r: must be a whole number, got", r="8")
_config("r of 10^39", "r: must be", r=10**39)
_config("infinite alpha", "lora_alpha: must be", lora_alpha=float("inf"))
_config("NaN alpha", "lora_alpha: must be", lora_alpha=float("nan"))
_config("alpha of text", "lora_alpha: must be a number", lora_alpha="16")
_config("dropout of a list", "lora_dropout: must be a number", lora_dropout=[])
_config("slow pattern", "takes too long to match", target_modules=_SLOW)
_config("pattern of a megabyte", "more than 10,000", target_modules="(a|" * 300_000)
_config("bad pattern", "is not a regular expression", target_modules="(((")
_config("pattern of repeats", "repeats more than 1,000 times", target_modules="(((a{1000}){1000}){1000}){1000}")
_config("a million names", "1,000,000 entries", target_modules=[f"m{i}" for i in range(1_000_000)])
_config("nine thousand names", "matches 0 modules", target_modules=[f"m{i}" for i in range(9000)])
_config("names of numbers", "target_modules", target_modules=[1, 2])
_config("many rank patterns", "more than 1,000", rank_pattern={f"m{i}": 4 for i in range(100_000)})
_config("slow rank patterns", "takes too long to match", rank_pattern={_SLOW: 4})
_config("rank pattern of a billion", "must be a whole number from 1 to 65536", rank_pattern={"q_proj": 10**9})
_config("ranks of text", "rank_pattern", rank_pattern={"q_proj": "8"})
_config("slow exclusion", "takes too long to match", exclude_modules=_SLOW)
_config("code", "no field 'auto_map'", auto_map={"AutoModel": "evil.Model"})
_config("a class of elsewhere", "is not supported", megatron_core="os.system")
_config("unknown method", "is none of", peft_type="__import__('os')")
_config("method of a list", "is none of", peft_type=["LORA"])
_config("init of elsewhere", "init_lora_weights", init_lora_weights="../../evil")
_config("PiSSA without end", "init_lora_weights", init_lora_weights="pissa_niter_999999999999")
_config("layers of a billion", "no layer 1000000000", layers_to_transform=[10**9])
_config("tokens of a billion", "rows of vocabulary", trainable_token_indices=[10**9])
_config("tokens below zero", "trainable_token_indices", trainable_token_indices=[-1])

_CONFIGS: dict[str, tuple[bytes, str]] = {
    "deep": (b'{"r": ' + b"[" * 100_000, "nested too deeply"),
    "hundred levels": (b'{"r": ' + b"[" * 100 + b"]" * 100 + b"}", "nested too deeply"),
    "a field twice": (b'{"peft_type": "LORA", "r": 8, "r": 9}', "'r' is given twice"),
    "not UTF-8": (b'{"r": "\xff"}', "not UTF-8"),
    "UTF-16": ('{"r": 8}'.encode("utf-16"), "not UTF-8"),
    "NUL": (b'{"r": "\0"}', "NUL character"),
    "a list": (b"[]", "must hold a JSON object"),
    "nothing": (b"", "not valid JSON"),
    "1e999": (b'{"peft_type": "LORA", "lora_alpha": 1e999}', "too large"),
    "many digits": (b'{"r": ' + b"9" * 5000 + b"}", "5,000 digits"),
}
for _name, (_text, _words) in _CONFIGS.items():

    def _spoil(folder: Path, text: bytes = _text) -> Path:
        spoiled = adapter_folder(folder)
        (spoiled / CONFIG).write_bytes(text)
        return spoiled

    case("adapter", _words, f"adapter_config: {_name}")(_spoil)


def _hole(make: Callable[[Path], Path], file: str, door: str, words: str) -> None:
    """A file of a gigabyte of zeros that takes no room on the disk."""

    def write(folder: Path) -> Path:
        spoiled = make(folder)
        with (spoiled / file).open("wb") as hole:
            hole.truncate(2**30)
        return spoiled

    case(door, words, f"{door}: a gigabyte of {file}")(write)


_hole(adapter_folder, CONFIG, "adapter", "such a file is not read")
_hole(adapter_folder, ADAPTER, "adapter", "not a JSON object")
_hole(model_folder, "config.json", "model", "such a file is not read")
_hole(model_folder, "tokenizer.json", "model", "this is no tokenizer's file")
_hole(model_folder, "tokenizer_config.json", "model", "such a file is not read")
_hole(checkpoint_folder, "step-1/state.json", "checkpoint", "such a file is not read")


def _outside(make: Callable[[Path], Path], file: str, door: str) -> None:
    """A link to a file outside of the folder, which is the right file otherwise."""

    def write(folder: Path) -> Path:
        spoiled = make(folder)
        (spoiled / file).rename(folder / "outside")
        (spoiled / file).symlink_to(folder / "outside")
        return spoiled

    case(door, "outside of the folder", f"{door}: link {file}")(write)


for _name in (CONFIG, ADAPTER):
    _outside(adapter_folder, _name, "adapter")
for _name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
    _outside(model_folder, _name, "model")
_outside(checkpoint_folder, "step-1/state.json", "checkpoint")
_outside(checkpoint_folder, "step-1/weights.safetensors", "checkpoint")


@case("adapter", "no adapter_config.json")
def adapter_config_is_a_pipe(folder: Path) -> Path:
    spoiled = adapter_folder(folder)
    (spoiled / CONFIG).unlink()
    os.mkfifo(spoiled / CONFIG)
    return spoiled


@case("adapter", "no adapter_model.safetensors")
def adapter_weights_are_a_folder(folder: Path) -> Path:
    spoiled = adapter_folder(folder)
    (spoiled / ADAPTER).unlink()
    (spoiled / ADAPTER).mkdir()
    return spoiled


@case("adapter", "a network share")
def adapter_on_a_share(folder: Path) -> Path:
    return Path("//evil.example/share")


def adapter_with_metadata(folder: Path, text: str) -> Path:
    """An adapter whose file says this where smidgen's metadata stand."""
    spoiled = adapter_folder(folder)
    header, body = split_safetensors(spoiled / ADAPTER)
    header["__metadata__"]["smidgen"] = text
    (spoiled / ADAPTER).write_bytes(join_safetensors(header, body))
    return spoiled


@case("adapter", "metadata of smidgen")
def adapter_metadata_is_deep(folder: Path) -> Path:
    return adapter_with_metadata(folder, "[" * 100_000)


@case("adapter", "base_fingerprint")
def adapter_fingerprint_is_a_list(folder: Path) -> Path:
    return adapter_with_metadata(folder, json.dumps({"base_fingerprint": [1]}))


@case("adapter", "does not fit the model")
def adapter_of_other_names(folder: Path) -> Path:
    spoiled = adapter_folder(folder)
    header, body = split_safetensors(spoiled / ADAPTER)
    renamed = {f"../../{name}" if name != "__metadata__" else name: entry for name, entry in header.items()}
    (spoiled / ADAPTER).write_bytes(join_safetensors(renamed, body))
    return spoiled


# ---- models ----


def _model(name: str, words: str, file: str = "config.json", **fields: Any) -> None:
    def write(folder: Path) -> Path:
        spoiled = model_folder(folder)
        edit_json(spoiled / file, **fields)
        return spoiled

    case("model", words, f"{file}: {name}")(write)


_model("hidden_size of a billion", "hidden_size is 1,000,000,000, more than", hidden_size=10**9)
_model("ten million layers", "num_hidden_layers is 10,000,000, more than", num_hidden_layers=10**7)
_model("a vocabulary of 10^10", "vocab_size is 10,000,000,000, more than", vocab_size=10**10)
_model("a model larger than its weights", "describes a model of", hidden_size=8192, intermediate_size=8192)
_model("many positions", "max_position_embeddings is", max_position_embeddings=10**12)
_model("negative sizes", "cannot be loaded", hidden_size=-32)
_model("no heads", "cannot be loaded", num_attention_heads=0)
_model("sizes of text", "cannot be loaded", hidden_size="32")
_model("unknown model_type", "cannot be loaded", model_type="evil")
_model("unknown model_type with code", "cannot be loaded", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
_model("model_type of a list", "cannot be loaded", model_type=["llama"])
_model("trust", "asks to trust code", trust_remote_code=True)
_model("trust within", "asks to trust code", text_config={"trust_remote_code": True})
_model("kernels of the hub", "names code of a hub", _attn_implementation="evil/kernels")
_model("kernels within", "names code of a hub", text_config={"attn_implementation": "evil/kernels@main:run"})
_model("trust", "asks to trust code", "tokenizer_config.json", trust_remote_code=True)
_model("special token of a list", "tokenizer", "tokenizer_config.json", pad_token=[1, 2])
_model("long BPE", "tokenizer", "tokenizer.json", model={"type": "BPE", "vocab": {}, "merges": ["a b"] * 9})


def _text(file: str, name: str, text: bytes, words: str) -> None:
    def write(folder: Path) -> Path:
        spoiled = model_folder(folder)
        (spoiled / file).write_bytes(text)
        return spoiled

    case("model", words, f"{file}: {name}")(write)


_text("config.json", "deep", b'{"a": ' + b"[" * 100_000, "nested too deeply")
_text("config.json", "a field twice", b'{"model_type": "llama", "model_type": "gpt2"}', "given twice")
_text("config.json", "UTF-16", '{"a": 1}'.encode("utf-16"), "not UTF-8")
_text("config.json", "a list", b"[]", "must hold a JSON object")
_text("tokenizer.json", "deep", b'{"model": ' + b"[" * 1_000_000, "tokenizer")
_text("tokenizer.json", "garbage", bytes(range(256)) * 99, "tokenizer")
_text("tokenizer.json", "a list", b"[]", "tokenizer")
_text("generation_config.json", "deep", b'{"a": ' + b"[" * 100_000, "nested too deeply")
_text("adapter_config.json", "in a model", b'{"base_model_name_or_path": "/etc"}', "folders of their own")


def _shard(name: str, target: Any, words: str) -> None:
    def write(folder: Path) -> Path:
        spoiled = model_folder(folder)
        (folder / "outside.safetensors").write_bytes((spoiled / "model.safetensors").read_bytes())
        (spoiled / "model.safetensors").rename(spoiled / "model-1.safetensors")
        (spoiled / "link.safetensors").symlink_to(folder / "outside.safetensors")
        names = split_safetensors(spoiled / "model-1.safetensors")[0].keys() - {"__metadata__"}
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, target)}
        (spoiled / "model.safetensors.index.json").write_text(json.dumps(index))
        return spoiled

    case("model", words, f"index: {name}")(write)


_shard("above", "../outside.safetensors", "must name a file in this folder")
_shard("far above", "../../../../etc/passwd", "must name a file in this folder")
_shard("absolute", "/etc/passwd", "must name a file in this folder")
_shard("drive", "C:\\windows\\win.ini", "must name a file in this folder")
_shard("share", "\\\\evil.example\\share\\x.safetensors", "must name a file in this folder")
_shard("address", "https://evil.example/x.safetensors", "must name a file in this folder")
_shard("NUL", "model-1.safetensors\0.bin", "must name a file in this folder")
_shard("dots", "..", "must name a file in this folder")
_shard("link", "link.safetensors", "outside of the folder")
_shard("pickle", "pytorch_model.bin", "refused: a pickle file")
_shard("absent", "model-2.safetensors", "no such file")
_shard("a number", 7, "refused: a pickle file")


@case("model", "a network share")
def model_on_a_share(folder: Path) -> Path:
    return Path("//evil.example/share")


# ---- GGUF ----


def _gguf_text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _gguf(tensors: int, fields: int, *parts: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + b"".join(parts)


def _field(name: bytes, kind: int, value: bytes) -> bytes:
    return _gguf_text(name) + struct.pack("<I", kind) + value


def _tensor(shape: list[int], kind: int, offset: int) -> bytes:
    return _gguf_text(b"t") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


_LLAMA = _field(b"general.architecture", 8, _gguf_text(b"llama"))
_GGUFS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "does not begin with GGUF"),
    "a pickle": (b"\x80\x04\x95", "does not begin with GGUF"),
    "cut off": (b"GGUF\x03\0\0\0", "not a readable GGUF file"),
    "version": (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "version 99"),
    "2^60 tensors": (_gguf(2**60, 0), "tensors, more than"),
    "2^60 fields": (_gguf(0, 2**60), "fields, more than"),
    "a text of 2^60 bytes": (_gguf(0, 1, struct.pack("<Q", 2**60)), "bytes of a text"),
    "an array of 2^60 items": (_gguf(0, 1, _field(b"a", 9, struct.pack("<IQ", 4, 2**60))), "items of an array"),
    "a cut array": (_gguf(0, 1, _field(b"a", 9, struct.pack("<IQ", 10, 10**6))), "cut off"),
    "arrays of arrays": (_gguf(0, 1, _field(b"a", 9, struct.pack("<IQ", 9, 5))), "unknown type 9"),
    "unknown field type": (_gguf(0, 1, _field(b"a", 77, b"")), "unknown type 77"),
    "unknown tensor type": (_gguf(1, 0, _tensor([32], 999, 0), bytes(99)), "unknown type 999"),
    "lying offset": (_gguf(1, 0, _tensor([32], 0, 2**50), bytes(999)), "ends at byte"),
    "a shape of 2^120": (_gguf(1, 0, _tensor([2**60, 2**60], 0, 0), bytes(99)), "has the shape"),
    "many dimensions": (_gguf(1, 0, _gguf_text(b"t"), struct.pack("<I", 2**31)), "dimensions"),
    "no architecture": (_gguf(0, 0), "architecture '' is not covered"),
    "architecture of a number": (_gguf(0, 1, _field(b"general.architecture", 4, bytes(4))), "is not covered"),
    "no fields": (_gguf(0, 1, _LLAMA), "tokenizer 'None'"),
    "a field twice": (_gguf(0, 2, _LLAMA, _LLAMA), "not a readable GGUF file"),
    "a name not UTF-8": (_gguf(0, 1, _field(b"\xff\xfe", 4, bytes(4))), "not a readable GGUF file"),
}
for _name, (_data, _words) in _GGUFS.items():

    def _write(folder: Path, data: bytes = _data) -> Path:
        (folder / "hostile.gguf").write_bytes(data)
        return folder / "hostile.gguf"

    case("gguf", _words, f"gguf: {_name}")(_write)


# ---- checkpoints and runs ----


def _state(name: str, words: str, **fields: Any) -> None:
    def write(folder: Path) -> Path:
        spoiled = checkpoint_folder(folder)
        edit_json(spoiled / "step-1" / "state.json", **fields)
        return spoiled

    case("checkpoint", words, f"state: {name}")(write)


_state("no step", "damaged: step", step=None)
_state("a step of text", "damaged: step", step="1")
_state("no generators", "damaged: random", random=None)
_state("generators of text", "the random generators are damaged", random=["x"])
_state("none of the generators", "the random generators are damaged", random=[])
_state(
    "a generator of a number", "the random generators are damaged", random=[{"python": [3, [1], None], "numpy": [1]}]
)
_state("another format", "checkpoint format 99", format=99)
_state("no format", "checkpoint format None", format=None)
_state(
    "a window of text", "damaged: window", window={"loss": "x", "count": 0, "tokens": 0, "seconds": 0, "metrics": {}}
)
_state(
    "metrics of text",
    "damaged: window",
    window={"loss": 0, "count": 0, "tokens": 0, "seconds": 0, "metrics": {"a": "b"}},
)
_state("another window", "damaged: window", window={"x": 1})
_state("a window of a list", "damaged: window", window=[])
_state("processes of a list", "damaged: processes", processes=[])


@case("checkpoint", "state.json: no such file")
def checkpoint_without_state(folder: Path) -> Path:
    spoiled = checkpoint_folder(folder)
    (spoiled / "step-1" / "state.json").unlink()
    return spoiled


@case("checkpoint", "state.json: not valid JSON")
def checkpoint_state_cut_off(folder: Path) -> Path:
    spoiled = checkpoint_folder(folder)
    path = spoiled / "step-1" / "state.json"
    path.write_bytes(path.read_bytes()[:-100])
    return spoiled


@case("checkpoint", "weights.safetensors: no such file")
def checkpoint_without_weights(folder: Path) -> Path:
    spoiled = checkpoint_folder(folder)
    (spoiled / "step-1" / "weights.safetensors").unlink()
    return spoiled


def _renamed(file: str, words: str, rename: Callable[[str], str]) -> None:
    def write(folder: Path) -> Path:
        spoiled = checkpoint_folder(folder)
        path = spoiled / "step-1" / file
        header, body = split_safetensors(path)
        path.write_bytes(join_safetensors({rename(name): entry for name, entry in header.items()}, body))
        return spoiled

    case("checkpoint", words, f"checkpoint: other names in {file}")(write)


_renamed("weights.safetensors", "only in the checkpoint", lambda name: f"x.{name}")
_renamed("optimizer.safetensors", "belongs to no parameter", lambda name: f"x.{name}")
_renamed("random.safetensors", "the random generators are damaged", lambda name: f"x{name}")


def _run(name: str, recipe: str, words: str) -> None:
    def write(folder: Path) -> Path:
        run = folder / "run"
        adapter_folder(folder).rename(folder / "kept")
        run.mkdir()
        (folder / "kept").rename(run / "adapter")
        (run / "recipe.yaml").write_text(recipe)
        return run

    case("run", words, f"run: {name}")(write)


_run("hostile recipe", "a: &a [*a]", "nested too deeply")
_run("deep recipe", "[" * 50_000, "nested too deeply")
_run("tag in the recipe", "model: !!python/object/apply:os.system ['touch PWNED']", "YAML tag")
_run(
    "a pickle for a model",
    "model: weights.pt\nadapter: {method: lora}\ndata: {train: a.jsonl}\noutput: run\n",
    "weights.pt",
)


@case("run", "a network share")
def run_of_an_adapter_on_a_share(folder: Path) -> Path:
    spoiled = adapter_folder(folder)
    edit_json(spoiled / CONFIG, base_model_name_or_path="\\\\evil.example\\share")
    return spoiled


@case("run", "names no base model")
def run_of_an_adapter_on_a_list(folder: Path) -> Path:
    spoiled = adapter_folder(folder)
    edit_json(spoiled / CONFIG, base_model_name_or_path=["a"])
    return spoiled


@case("checkpoint", "log.jsonl: damaged")
def log_of_lists(folder: Path) -> Path:
    spoiled = checkpoint_folder(folder)
    (folder / "again").mkdir()
    (folder / "again" / "log.jsonl").write_text("[]\n")
    return spoiled


@case("checkpoint", "log.jsonl: nested too deeply")
def log_that_is_deep(folder: Path) -> Path:
    spoiled = checkpoint_folder(folder)
    (folder / "again").mkdir()
    (folder / "again" / "log.jsonl").write_text("[" * 100_000 + "\n")
    return spoiled
