"""Puts the linear layers of a model into 4 or 8 bits: while it is loaded, afterwards, or from files that hold them so.

What is described by transformers' `BitsAndBytesConfig` is computed here, without bitsandbytes: the codes are the same,
and so are the files. As transformers does, the head and layers that share its weight stay in 16 bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from smidgen import quant
from smidgen.adapters.attach import Adapted
from smidgen.adapters.targets import language_half
from smidgen.errors import ModelError, UsageError
from smidgen.models.mapped import MappedFiles
from smidgen.quant.linear import QuantizedLinear

_METHOD = "smidgen"


def quantization_config(
    kind: str, double: bool = True, dtype: torch.dtype = torch.bfloat16, skip: list[str] | None = None
) -> BitsAndBytesConfig:
    """The description of a model in nf4, fp4 or int8, computed in `dtype`; `skip` names modules to leave out."""
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip, bnb_4bit_compute_dtype=dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def kind_of(config: BitsAndBytesConfig) -> str:
    """nf4, fp4 or int8.

    Raises:
        UsageError: the description asks for neither 4 nor 8 bits, or for what only a GPU's kernels do.
    """
    if not (config.load_in_4bit or config.load_in_8bit):
        raise UsageError("quantization_config: asks for neither load_in_4bit nor load_in_8bit")
    if config.load_in_8bit and config.llm_int8_has_fp16_weight:
        raise UsageError("quantization_config: llm_int8_has_fp16_weight keeps 16-bit weights; leave it out")
    kind = config.bnb_4bit_quant_type if config.load_in_4bit else "int8"
    if kind not in quant.KINDS:
        raise UsageError(f"quantization_config: bnb_4bit_quant_type '{kind}' is none of nf4, fp4")
    return kind


def quantize_model(model: Any, config: BitsAndBytesConfig) -> None:
    """Quantise the linear layers of a loaded model, in place, one at a time.

    Raises:
        UsageError: the model has adapters already, or is quantised.
    """
    if any(isinstance(module, Adapted) for module in model.modules()):
        raise UsageError("quantize: the model has adapters; quantise it before they are attached")
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise UsageError("quantize: the model is quantised already")
    for path in list(_targets(model, config)):
        module = model.get_submodule(path)
        QuantizedLinear.take_over(module, _stored(module, module.weight.detach(), config, path))
    _mark(model, config)


def take_over_bitsandbytes(model: nn.Module) -> int:
    """Let layers that bitsandbytes has loaded compute here, with the same codes in the same memory; answer how many.

    Raises:
        ModelError: one of them is not quantised yet.
    """
    count = 0
    for module in model.modules():
        if packed := quant.packed_of(module, compute_dtype=_compute_dtype(model, module)):
            QuantizedLinear.take_over(module, packed)
            count += 1
    return count


def prepare_model_for_kbit_training(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: dict[str, Any] | None = None
) -> Any:
    """Freeze a quantised model and, unless told otherwise, let it keep less of each layer; answer the same model.

    Norms and embeddings stay in 16 bits: sums are taken in float32 wherever that matters.
    """
    take_over_bitsandbytes(model)
    model.requires_grad_(False)
    if use_gradient_checkpointing:
        how = gradient_checkpointing_kwargs or {"use_reentrant": False}
        if how.get("use_reentrant", True):  # such checkpoints pass on gradients only where an input has one
            model.enable_input_require_grads()
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # it has a newer name, not yet in 5.0
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    return model


def _compute_dtype(model: Any, module: Any) -> torch.dtype | None:
    """int8 layers of bitsandbytes compute in what they are given: the type of the rest of the model."""
    is_int8 = not hasattr(module, "compute_dtype")
    return getattr(model, "dtype", None) if is_int8 else None


def unquantize(model: Any) -> None:
    """Make every layer plain again, with the weights that it computes with."""
    for module in list(model.modules()):
        if isinstance(module, QuantizedLinear):
            module.give_back()
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(name, None)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """The layers whose weight is stored in 4 or 8 bits, by path."""
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and module.packed is not None:
            yield path, module


def parameter_count(model: nn.Module) -> int:
    """How many numbers the model has, however they are stored."""
    stored = sum(module.out_features * module.in_features for _, module in quantized_layers(model))
    return stored + sum(parameter.numel() for parameter in model.parameters())


def parameter_bytes(model: nn.Module) -> int:
    """What they take in memory."""
    parts = [buffer for _, module in quantized_layers(model) for buffer in module.buffers(recurse=False)]
    once = {tensor.data_ptr(): tensor.nbytes for tensor in parts}  # all share one code book of the scales
    return sum(once.values()) + sum(parameter.nbytes for parameter in model.parameters())


# ---- for transformers ----


class QuantizationConfig(BitsAndBytesConfig):
    """`BitsAndBytesConfig`, so that transformers takes the quantizer of this module.

    dtype: what the weights are made dense in. ready: the stored weights of files that hold the model so, by layer.
    """

    def __init__(self, config: BitsAndBytesConfig, dtype: torch.dtype, ready: Mapping[str, quant.Packed] | None = None):
        vars(self).update(vars(config), quant_method=_METHOD, bnb_4bit_compute_dtype=dtype, ready=ready)


class Quantizer(HfQuantizer):
    """Quantises each weight when transformers has read it, before it reads the next."""

    requires_calibration = False
    quantization_config: Any  # a QuantizationConfig

    def __init__(self, quantization_config: Any, **kwargs: Any):
        super().__init__(quantization_config, **kwargs | {"pre_quantized": False})
        self.layers: set[str] = set()
        self.files: MappedFiles | None = None

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        ready = self.quantization_config.ready
        self.layers = set(_targets(model, self.quantization_config)) if ready is None else set(ready)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        return name == "weight" and path in self.layers

    def get_quantize_ops(self) -> Any:
        self.files = self.files or MappedFiles()  # which are open by now
        return _Quantize(self.quantization_config, self.files)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for path in self.layers:
            module = model.get_submodule(path)
            QuantizedLinear.take_over(module, module.weight.packed)
        _mark(model, self.quantization_config)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        return state_dict(model), {}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        unquantize(model)
        return model


register_quantization_config(_METHOD)(QuantizationConfig)
register_quantizer(_METHOD)(Quantizer)


class _Quantize(ConversionOps):
    """Answers a place for the weight with the stored one attached: what a layer is cannot change while it loads."""

    def __init__(self, config: Any, files: MappedFiles):
        self.config, self.files = config, files

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        model, places = kwargs["model"], {}
        for name, value in input_dict.items():
            name = kwargs.get("full_layer_name") or name
            value, path = value[0] if isinstance(value, list) else value, name.rpartition(".")[0]
            module, ready = model.get_submodule(path), self.config.ready
            packed = ready[path] if ready is not None else _stored(module, value, self.config, path)
            self.files.let_go(value)
            place = nn.Parameter(torch.empty(0), requires_grad=False)
            place.packed = packed  # type: ignore[attr-defined]
            places[name] = place
        return places


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What files hold of a quantised model, under the names that bitsandbytes and transformers give it."""
    tensors = dict(model.state_dict())
    for path, module in quantized_layers(model):
        for name in ("codes", "scales", "nested_scales", "nested_book"):
            tensors.pop(f"{path}.{name}", None)
        assert module.packed is not None
        tensors |= quant.to_tensors(module.packed, path)
    return tensors


def unpack(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, quant.Packed], dict[str, Tensor]]:
    """The stored weights among the tensors of files, by layer, and the tensors of the rest, with a place for each.

    Raises:
        ModelError: stored weights are damaged.
    """
    marks = (".absmax", ".SCB")
    layers = [name.removesuffix(".weight.absmax").removesuffix(".SCB") for name in tensors if name.endswith(marks)]
    beside = tuple(f"{layer}.{part}" for layer in layers for part in ("weight.", "SCB", "weight_format"))
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(beside)}
    return {layer: quant.from_tensors(tensors, layer, compute_dtype=dtype) for layer in layers}, rest


def _targets(model: Any, config: BitsAndBytesConfig) -> Iterator[str]:
    """The paths of the layers that are quantised: linear ones, but for the head and those that are left out by name.

    Of a model that takes images, those of its language half.
    """
    kept = HfQuantizer.get_modules_to_not_convert(model, config.llm_int8_skip_modules, model._keep_in_fp32_modules)
    half = language_half(model)
    for path, module in model.named_modules():
        left_out = any(path == name or f".{name}." in f".{path}." for name in kept)
        if type(module) in (nn.Linear, Conv1D) and not left_out and path.startswith(half):
            yield path


def _stored(module: Any, weight: Tensor, config: BitsAndBytesConfig, path: str) -> quant.Packed:
    kind = kind_of(config)
    double = config.bnb_4bit_use_double_quant and kind != "int8"
    try:
        matrix = weight.T.contiguous() if isinstance(module, Conv1D) else weight
        return quant.quantize(matrix, kind, double=double, compute_dtype=config.bnb_4bit_compute_dtype)  # type: ignore[arg-type]
    except (UsageError, ModelError) as error:
        raise type(error)(f"{path}: {error}") from None


def _mark(model: Any, config: BitsAndBytesConfig) -> None:
    """Let the model say what it is, so that its configuration and files do.

    transformers casts no model of which it knows that it is quantised; these layers can be cast.
    """
    described = BitsAndBytesConfig()
    vars(described).update({name: vars(config)[name] for name in vars(described)}, quant_method=described.quant_method)
    model.config.quantization_config = described
    model.hf_quantizer = Quantizer(QuantizationConfig(described, described.bnb_4bit_compute_dtype))
    model.is_quantized = False
    vars(model).pop("quantization_method", None)
    setattr(model, "is_loaded_in_4bit" if described.load_in_4bit else "is_loaded_in_8bit", True)
