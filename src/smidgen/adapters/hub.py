"""Folders of adapter-hub's library `adapters` (1.x) that hold a bottleneck adapter: read as if we had written them.

``adapter_config.json`` has the adapter's fields under "config", ``adapter.safetensors`` keys such as
``model.layers.0.output_adapters.adapters.NAME.adapter_up.weight``; BERT's have no ``output_adapters`` in them.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from smidgen.adapters.blocks import blocks
from smidgen.errors import AdapterFileError, raise_all
from smidgen.foreign import shown

WEIGHTS_NAME = "adapter.safetensors"
FUSION = "adapter_fusion_layer"  # what stands before the name of a fusion in a key
_KEY = re.compile(r"(?P<place>.+)\.adapters\.[^.]+\.(?P<name>adapter_(?:down\.0|up)\.(?:weight|bias))")
# What changes the answers and is not offered here: the value that switches it off.
_OFF = {
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "use_gating": False,
    "residual_before_ln": True,
    "inv_adapter": None,
    "cross_adapter": False,
    "phm_layer": False,
    "stochastic_depth": 0.0,
}
# (is_parallel, original_ln_before, mh_adapter, output_adapter)
_KINDS = {
    (False, False, True, True): "houlsby",
    (False, True, False, True): "pfeiffer",
    (True, False, False, True): "parallel",
}


def as_fields(fields: dict[str, Any], place: str) -> dict[str, Any]:
    """The fields of our configuration, if these are the library's; others as they are.

    Raises:
        AdapterFileError: the adapter has parts that are not offered here.
    """
    config = fields.get("config")
    if "peft_type" in fields or not isinstance(config, dict):
        return fields
    problems = [
        f"{place}: {name}={shown(repr(config[name]))} is not supported"
        for name, off in {**_OFF, "architecture": None}.items()
        if config.get(name, off) != off
    ]
    switches = ("is_parallel", "original_ln_before", "mh_adapter", "output_adapter")
    kind = _KINDS.get(tuple(bool(config.get(name)) for name in switches))  # type: ignore[arg-type]
    if kind is None:
        problems.append(f"{place}: {', '.join(switches)} fit none of {', '.join(_KINDS.values())}")
    raise_all(AdapterFileError, problems)
    taken = ("reduction_factor", "non_linearity", "scaling", "dropout", "leave_out")
    base = {"base_model_name_or_path": fields.get("model_name")}
    return base | {"peft_type": "BOTTLENECK", "kind": kind} | {name: config[name] for name in taken if name in config}


def as_keys(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The library's tensors under our keys for this model; others as they are."""
    if not any(_KEY.fullmatch(key) for key in tensors):
        return tensors
    places = {}
    for layer, place in place_names(model).items():
        # The library's key begins at the model with its head, or without.
        places |= dict.fromkeys((place, place.partition(".")[2]), layer)
    renamed = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        place = places.get(match["place"]) if match else None
        renamed[f"base_model.model.{place}.{match['name']}" if match and place else key] = tensor
    return renamed


def place_names(model: nn.Module) -> dict[str, str]:
    """What the library calls the places after both sublayers of each block, by the path of our layer.

    Raises:
        TargetError: the model has no blocks that are known.
    """
    names = {}
    for path, block in blocks(model):
        after = ("attention.output", "output") if block.norm else ("attention_adapters", "output_adapters")
        names |= {
            f"{path}.{block.attention}": f"{path}.{after[0]}",
            f"{path}.{block.feed_forward}": f"{path}.{after[1]}",
        }
    return names


def fusion_keys(tensors: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """The tensors, with those of a fusion under the names that the adapters which it fuses have in this model."""
    name = f".{FUSION}.{','.join(names)}."
    return {re.sub(rf"\.{FUSION}\.[^.]+\.", name, key) if names else key: tensor for key, tensor in tensors.items()}
