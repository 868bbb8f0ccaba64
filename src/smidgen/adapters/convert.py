"""The LoRA adapter that is nearest to an adapter of another method, or of a larger rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smidgen.adapters.attach import State, adapters_of, attach, fold_in_float32, merged_names
from smidgen.adapters.base import WeightAdapter
from smidgen.adapters.config import whole_number
from smidgen.adapters.experts import ParameterLora
from smidgen.adapters.layers import layer_of
from smidgen.adapters.methods.lora import Lora, LoraConfig
from smidgen.adapters.nearest import Nearest, nearest
from smidgen.adapters.targets import names_of
from smidgen.adapters.trained import Mirror, TokenRows
from smidgen.errors import MergeError, UsageError, raise_all


@torch.no_grad()
def attach_as_lora(model: nn.Module, state: State, source: str, name: str, rank: int) -> dict[str, Nearest]:
    """Attach, as `name`, the LoRA adapter of `rank` that is nearest to the adapter `source`; answer what it keeps.

    The update of a layer is merge(W) - W, in fp32. Biases, and what is trained in full beside, are taken as they are.

    Raises:
        UsageError: `source` changes no weight that LoRA can change, or the rank is none; nothing was changed.
        MergeError: `source` cannot be merged; nothing was changed.
    """
    places: dict[str, Any] = dict(adapters_of(model, source))
    updated = [path for path, adapter in places.items() if _changes_weight(adapter)]
    config = state.configs[source]
    problems = whole_number("rank", rank)
    if not updated:
        method = config.peft_type.lower()
        problems.append(f"adapter '{source}': {method} is no update of weights, so there is nothing to convert to LoRA")
    if any(isinstance(adapter, ParameterLora) for adapter in places.values()):
        problems.append("target_parameters: LoRA of experts is LoRA already, and has no nearest one by layers")
    if merged_names(model):
        problems.append("adapters are merged into the weights; call unmerge_adapter() first")
    problems += [
        f"{path}: LoRA mixes all channels, which a convolution with groups does not hold"
        for path in updated
        if getattr(model.get_submodule(path), "groups", 1) > 1
    ]
    raise_all(UsageError, problems)
    found: dict[str, Nearest] = {}
    biases: dict[str, Tensor] = {}
    for path in updated:
        module = model.get_submodule(path)
        try:
            before, after = fold_in_float32(module, []), fold_in_float32(module, [source])
        except MergeError as error:
            raise MergeError(f"{path}: {error}") from error
        layer = layer_of(module)
        assert layer is not None
        update = layer.matrix(after["weight"].float() - before["weight"].float())
        if not torch.isfinite(update).all():
            raise MergeError(f"{path}: the update has values that are not finite")
        found[path] = nearest(update, rank)
        if (bias := after.get("bias")) is not None and bias is not before["bias"]:
            biases[path] = bias
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=names_of(model, updated),
        bias="all" if getattr(config, "bias", "none") == "all" else "lora_only" if biases else "none",
        modules_to_save=config.modules_to_save,
        trainable_token_indices=getattr(config, "trainable_token_indices", None),
        ensure_weight_tying=getattr(config, "ensure_weight_tying", False),
        fan_in_fan_out=getattr(config, "fan_in_fan_out", False),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
    )
    attach(model, state, name, list(Lora.plan(model, lora)), Lora, lora)
    for path, adapter in adapters_of(model, name):
        if isinstance(adapter, Lora):
            adapter.set_factors(found[path].a, found[path].b)
            if path in biases and adapter.bias is not None:
                adapter.bias.copy_(biases[path])
        elif not isinstance(adapter, Mirror):
            for parameter, tensor in adapter.named_parameters():
                tensor.copy_(places[path].get_parameter(parameter))
    return found


def _changes_weight(adapter: Any) -> bool:
    return isinstance(adapter, WeightAdapter) and not isinstance(adapter, TokenRows | Mirror)
