"""Loads a model and its tokenizer from a local folder, and tells what the machine makes of it."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from smidgen.adapters.config import PeftConfig, TaskType
from smidgen.adapters.files import saved_labels
from smidgen.data.templates import choose_template
from smidgen.errors import ModelError
from smidgen.foreign import shown
from smidgen.models.folder import check_documents, check_model_folder, kind_told
from smidgen.models.images import load_reader, model_class, model_classes
from smidgen.models.mapped import own_memory
from smidgen.models.peft_model import PeftModel
from smidgen.models.quantize import QuantizationConfig, kind_of, quantization_config, quantized_layers, unpack
from smidgen.models.tasks import AUTO_CLASSES, label_fields, remember_new_heads, task_of_config
from smidgen.models.tokens import check_tokens, take_tokens
from smidgen.models.vocabulary import vocabulary_of
from smidgen.quant import bits
from smidgen.recipe import Recipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    path: Path,
    dtype: str = "auto",
    *,
    task: str | None = None,
    labels: Sequence[str] = (),
    quantization_config: BitsAndBytesConfig | None = None,
    device: torch.device | None = None,
    say: Callable[[str], None] = print,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model of a folder and its tokenizer; answer both, the model in evaluation mode on `device`.

    Args:
        path: a Hugging Face folder with safetensors weights, as `resolve_model` answers it.
        dtype: "auto", "float32", "bfloat16" or "float16"; "auto" is `choose_dtype`.
        task: what the model is made to do, a name of `TaskType`; None: what its configuration says. A head that the
            files do not hold is made anew (`models.tasks.new_heads`).
        labels: the names of the classes; none: those of the configuration.
        quantization_config: store the linear layers in 4 or 8 bits; each is quantised before the next is read. Files
            that hold them so already are loaded as they are. With it, "auto" is its compute dtype.
        device: where the model goes; None is `best_device`.
        say: gets the lines about what was chosen.

    Raises:
        ModelError: the folder is no model, its architecture needs code of its own, or weights are missing in its files.
    """
    kind = TaskType(task.upper()) if task else task_of_config(check_documents(path).get("config.json", {}))
    auto = AUTO_CLASSES[kind]
    check_model_folder(path, auto)
    device = device or best_device()
    if quantization_config is not None and dtype == "auto":
        dtype = str(quantization_config.bnb_4bit_compute_dtype).removeprefix("torch.")
    chosen, reason = choose_dtype(dtype, device)
    place = f"{device}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    say(f"device: {place}; dtype: {str(chosen).removeprefix('torch.')} ({reason}), adapters float32")
    try:
        with quiet():
            made_by, source = _source(path, auto, labels, quantization_config, chosen)
            loaded: Any = made_by.from_pretrained(
                **source,
                ignore_mismatched_sizes=bool(labels),
                dtype=chosen,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
            tokenizer = load_tokenizer(path)
    except ModelError:
        raise
    except Exception as error:  # what foreign files raise in other libraries is open
        raise ModelError(f"{path}: cannot be loaded as {kind_told(auto)}: {shown(error)}") from error
    model, report = loaded
    with quiet():
        load_reader(path, model, tokenizer, say)
    absent = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if kind not in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM):
        absent = remember_new_heads(model, absent)
        model.config.pad_token_id = tokenizer.pad_token_id  # models that read the last token skip the padding by it
    if absent:
        raise ModelError(f"{path}: {len(absent)} weights are missing or have another shape: {', '.join(absent[:5])}")
    if report["unexpected_keys"]:
        extra = sorted(report["unexpected_keys"])
        say(f"{path}: {len(extra)} tensors of the files are not part of the model: {', '.join(extra[:5])}")
    own_memory(model)
    if getattr(model.config, "quantization_config", None) is not None:
        say(_quantized_line(model))
    return model.to(device).eval(), tokenizer


def _source(
    path: Path, auto: Any, labels: Sequence[str], wanted: BitsAndBytesConfig | None, dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    """The class that loads a model, and where from: its folder, or what the folder holds in 4 or 8 bits.

    Raises:
        ModelError: the files hold weights that are stored in a way that is not read here, or not as it is wanted.
    """
    config: Any = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    config.update(label_fields(labels))
    generates = auto is AUTO_CLASSES[TaskType.CAUSAL_LM]
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        how = {} if wanted is None else {"quantization_config": QuantizationConfig(wanted, dtype)}
        made_by = model_class(config) if generates else auto
        return made_by, {"pretrained_model_name_or_path": path, "config": config, **how}
    if stored.get("quant_method") != "bitsandbytes":
        raise ModelError(f"{path}: its weights are quantised by '{shown(stored.get('quant_method'))}', not read here")
    described: Any = BitsAndBytesConfig.from_dict(stored)
    if wanted is not None and kind_of(wanted) != kind_of(described):
        raise ModelError(f"{path}: its weights are {kind_of(described)} already, not {kind_of(wanted)}")
    del config.quantization_config
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    packed, rest = unpack(tensors, dtype)
    how = {"quantization_config": QuantizationConfig(described, dtype, packed), "state_dict": rest}
    classes = model_classes(config) if generates else auto._model_mapping
    return classes[type(config)], {"pretrained_model_name_or_path": None, "config": config, **how}


def _quantized_line(model: Any) -> str:
    layers = [layer for _, layer in quantized_layers(model)]
    count = sum(layer.out_features * layer.in_features for layer in layers)
    stored = sum(bits(layer.packed) * layer.out_features * layer.in_features for layer in layers if layer.packed)
    kind = kind_of(model.config.quantization_config)
    return f"quantised: {count:,} parameters in {kind}, {stored / count:.3f} bits each; the rest stays as it is"


def load_as(recipe: Recipe | None, dtype: str, device: torch.device | None = None) -> dict[str, Any]:
    """How a recipe's base is to be loaded: arguments of `load_model`."""
    if recipe is None:
        return {"dtype": dtype}
    if recipe.quantize is None:
        return {"dtype": dtype, "task": recipe.model_task}
    chosen, _ = choose_dtype(dtype, device or best_device())
    config = quantization_config(recipe.quantize, recipe.double_quantization, chosen)
    return {"dtype": str(chosen).removeprefix("torch."), "task": recipe.model_task, "quantization_config": config}


def load_adapted(
    folder: Path,
    base: Path,
    dtype: str = "auto",
    *,
    task: str | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    device: torch.device | None = None,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load the model in `base`, attach the adapter in `folder`, and answer it with the tokenizer of that folder.

    That tokenizer has the chat template of the training; where the folder holds none, the base's tokenizer serves.
    `task` is the adapter's own where it is not given.
    `force` loads an adapter onto another base than it was trained on.

    Raises:
        ModelError: as `load_model`.
        AdapterFileError: the adapter's files do not fit the model.
    """
    task = task or PeftConfig.from_pretrained(folder).task_type
    model, tokenizer = load_model(
        base,
        dtype,
        task=task,
        labels=saved_labels(folder),
        quantization_config=quantization_config,
        device=device,
        say=say,
    )
    adapted = PeftModel.from_pretrained(model, folder, force=force)
    tokens = vocabulary_of(adapted).tokens
    check_tokens(tokenizer, tokens, str(folder))
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(folder)
    take_tokens(tokenizer, tokens, str(folder))
    return adapted, tokenizer


def best_device() -> torch.device:
    """Answer the fastest kind of device at hand: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def free_memory(device: torch.device) -> int:
    """Bytes that the device can still give."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return psutil.virtual_memory().available


def choose_dtype(dtype: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Answer the dtype of the base weights and why; "auto" is bfloat16 where the hardware computes in it, else float32.

    Raises:
        ModelError: there is no dtype of that name.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ModelError(f"dtype: '{dtype}' is none of auto, {', '.join(DTYPES)}")
        return DTYPES[dtype], "as asked"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return (torch.bfloat16, "the gpu has it") if native else (torch.float32, "the gpu has no bfloat16")
    if device.type == "mps":
        return torch.float32, "mps"
    flags = torch.cpu.get_capabilities()
    native = [flag for flag in ("avx512_bf16", "amx_bf16", "bf16") if flags.get(flag)]
    if native:
        return torch.bfloat16, f"cpu has {native[0]}"
    return torch.float32, f"{platform.machine()} cpu without bfloat16 arithmetic"


def stop_token_ids(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Answer the token ids that end an answer.

    These are the end tokens of the model's generation config, the tokenizer's end token, and the token that the chat
    template writes right after an assistant's words, if that is one special token.
    """
    declared: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    end: Any = tokenizer.eos_token_id
    stops = {end, *(declared if isinstance(declared, list) else [declared])}
    if tokenizer.chat_template:
        after = tokenizer.encode(choose_template(tokenizer, None, "").closing.strip(), add_special_tokens=False)
        added = tokenizer.added_tokens_decoder
        if len(after) == 1 and after[0] in added and added[after[0]].special:
            stops.add(after[0])
    return {stop for stop in stops if stop is not None}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder; one that has no padding token pads with its end token."""
    check_documents(folder)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # what foreign files raise in other libraries is open
        raise ModelError(f"{folder}: the tokenizer cannot be loaded: {shown(error)}") from error
    if tokenizer.pad_token_id is None:
        # Padding is masked by length, so any token serves; the end token keeps its meaning in labels.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and warnings, and give them back as they were."""
    log: Any = transformers.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
