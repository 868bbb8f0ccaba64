"""Models that take images: which class loads them, what reads their images, and which part of them is what.

Such a model has a vision encoder, a projector of its answers to the width of the tokens, and a language half. The
reader is kept on the model, so that who has the one has the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from smidgen.adapters.targets import language_half
from smidgen.data.images import ImageReader
from smidgen.errors import UsageError
from smidgen.foreign import shown

_READER = "image_reader"  # the attribute of a model


def model_class(config: PretrainedConfig) -> Any:
    """The class of transformers that loads the model of a configuration."""
    return AutoModelForImageTextToText if _takes_images(config) else AutoModelForCausalLM


def model_classes(config: PretrainedConfig) -> Any:
    """From the classes of configurations to those of models: the mapping that holds the one of `config`."""
    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if _takes_images(config) else MODEL_FOR_CAUSAL_LM_MAPPING


def _takes_images(config: PretrainedConfig) -> bool:
    return hasattr(config, "vision_config") and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def load_reader(folder: Path, model: Any, tokenizer: Any, say: Callable[[str], None]) -> None:
    """Give a model that takes images the reader of its folder; where there is none that can be used, say why.

    A tokenizer without a chat template gets the processor's.
    """
    if not language_half(model):
        return
    try:
        from transformers import AutoProcessor

        processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        vars(model)[_READER] = ImageReader(processor)
        tokenizer.chat_template = tokenizer.chat_template or processor.chat_template
    except ImportError as error:
        say(f"images: not taken; install them with smidgen: pip install 'smidgen[vision]' ({shown(error)})")
    except Exception as error:  # what foreign files raise in other libraries is open
        say(f"images: not taken: {shown(error)}")


def reader_of(model: Any) -> ImageReader | None:
    """What reads the images of a model; None: it takes none."""
    return vars(model).get(_READER)


def image_inputs(model: Any, paths: Sequence[str]) -> dict[str, torch.Tensor]:
    """What a model takes of the images at `paths`, beside the tokens, on its device.

    Raises:
        UsageError: it takes no images.
        BadImage: a file cannot be read.
    """
    if (reader := reader_of(model)) is None:
        raise UsageError(f"{type(model).__name__}: takes no images")
    return reader.inputs(paths, model.device)


def projectors_of(model: Any) -> list[str]:
    """The names of the modules between the vision encoder and the language half."""
    return [name for name, module in _parts(model) if not isinstance(module, PreTrainedModel)]


def told_halves(model: Any) -> Iterator[str]:
    """A line about what is trained of a model that takes images, beside its language half."""
    kinds = {"vision encoder": True, "projector": False}
    told = []
    for kind, encoder in kinds.items():
        parts = [module for _, module in _parts(model) if isinstance(module, PreTrainedModel) is encoder]
        if parts:
            trained = any(parameter.requires_grad for part in parts for parameter in part.parameters())
            told.append(f"{kind}: {'trained' if trained else 'frozen'}")
    if told:
        yield "; ".join(told)


def _parts(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """What stands beside the language half: the vision encoder, the projector."""
    half = language_half(model).removesuffix(".")
    above = model.get_submodule(half.rpartition(".")[0])
    for name, module in above.named_children() if half else ():
        beside = name != half.rpartition(".")[2] and module is not model.get_output_embeddings()
        if beside and any(True for _ in module.parameters()):
            yield name, module
