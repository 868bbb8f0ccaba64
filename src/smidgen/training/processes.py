"""Several processes that train one model: who they are, and how they share a model, gradients and what is saved.

Without `train.fsdp` every process holds the whole model and the gradients of the trained parameters are added up. With
``fsdp: full_shard`` (FSDP2) parameters, gradients and optimizer states are spread over the processes as DTensors; a
block of the model is put together when it computes, so all processes must make the same number of passes.

All functions may be called in a run of one process. Those that are marked *together* must be called by all processes.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from smidgen.errors import UsageError, raise_all
from smidgen.recipe import TrainRecipe
from smidgen.training import zero
from smidgen.training.launch import world as launched

# Tokenising and checking by the first process alone may take long; a process that is gone is noticed at once.
TIMEOUT = timedelta(hours=6)
BUCKET = 2**22  # numbers that are added up in one message
_START = 32  # numbers of each tensor that are compared between processes

# What accelerate's configuration asks for by the environment, and what to do instead.
_ELSEWHERE = {
    "ACCELERATE_USE_FSDP": "write 'fsdp: full_shard' in 'train' of the recipe and leave FSDP out of accelerate's "
    "configuration",
    "ACCELERATE_USE_MEGATRON_LM": "take 'fsdp: full_shard' in 'train' of the recipe",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "take 'fsdp: full_shard' in 'train' of the recipe",
}


def check_launch(train: TrainRecipe, trains_base: bool) -> None:
    """Refuse, before anything is started, what the processes that were launched cannot do.

    Args:
        trains_base: whether parameters of the base model are trained, and no adapter.

    Raises:
        UsageError: with a line for each problem.
    """
    count, here = launched(), int(os.environ.get("LOCAL_WORLD_SIZE", launched()))
    problems = [
        f"{variable}: this part of accelerate's configuration is not used here; {remedy}"
        for variable, remedy in _ELSEWHERE.items()
        if _asked(variable)
    ]
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        problems.append(
            f"ACCELERATE_MIXED_PRECISION={precision}: the recipe says how numbers are kept, by 'dtype' in 'train'; "
            "write 'mixed_precision: no' in accelerate's configuration, or --mixed_precision no"
        )
    problems += zero.problems(train, trains_base) if zero.asked() else []
    if count == 1 and zero.asked():
        problems.append("DeepSpeed: one process has nothing to share; start several: --num_processes 2")
    if train.fsdp and count == 1:
        problems.append("train.fsdp: one process has nothing to share; start several: --processes 2, or leave it out")
    if train.batch_size < count:
        problems.append(
            f"train.batch_size: {train.batch_size} rows per update are fewer than the {count} processes; "
            f"set it to at least {count}, or start fewer"
        )
    on_cpu = _asked("ACCELERATE_USE_CPU")
    if count > 1 and torch.cuda.is_available() and not on_cpu and here > torch.cuda.device_count():
        problems.append(f"{here} processes, but {torch.cuda.device_count()} GPUs here: start one process for each GPU")
    if count > 1 and torch.backends.mps.is_available() and not on_cpu:
        problems.append(
            "several processes: MPS cannot join them; start one, or compute on the CPU: ACCELERATE_USE_CPU=true"
        )
    raise_all(UsageError, problems)


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1", "yes")


def check_shardable(base: Path) -> None:
    """Raises UsageError if the model in a folder has weights that FSDP cannot shard."""
    quantised = json.loads((base / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if quantised:
        bits = "int8" if quantised.get("load_in_8bit") else quantised.get("quant_method", "quantised")
        raise UsageError(
            f"train.fsdp: FSDP cannot shard {bits} weights; take the model's 16-bit weights, or leave out 'fsdp': then "
            "every process holds the whole model"
        )


def check_number(found: Mapping[str, Any]) -> None:
    """Raises UsageError if the state of a checkpoint is that of another number of processes than there are now."""
    if found["processes"] != launched():
        raise UsageError(
            f"cannot resume: the checkpoint is of {found['processes']} processes, this run has {launched()}: it would "
            f"not go on to the bit. Start it with --processes {found['processes']}, or begin a new run from trained "
            "weights: --init-adapter FOLDER output=OTHER"
        )


# ---- who they are ----


def world() -> int:
    """How many processes have joined the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes and tells."""
    return not dist.is_initialized() or dist.get_rank() == 0


def introduce(accelerator: Accelerator, batch_size: int) -> str | None:
    """*Together*: make sure that the processes joined as they were launched, each on a device of its own.

    Returns:
        ``world 2, global batch 16 = 2 processes x 8 rows; rank 0: cpu, rank 1: cpu``; None for one process.

    Raises:
        UsageError: they did not.
    """
    count = accelerator.num_processes
    if count != launched():
        raise UsageError(f"{launched()} processes were launched, but {count} joined the run")
    if count == 1:
        return None
    device = accelerator.device
    name = str(device) if device.index is not None and device.type != "cpu" else device.type
    unit = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else f"process {os.getpid()}"
    told = [text.decode() for text in gather_bytes(f"{name}\n{platform.node()} {unit}".encode(), device)]
    devices, units = [text.split("\n")[0] for text in told], [text.split("\n")[1] for text in told]
    shared = [f"rank {rank}" for rank, unit in enumerate(units) if units.count(unit) > 1]
    if shared:
        raise UsageError(f"{', '.join(shared)} share a device with another; start one process for each GPU")
    rows = [len(range(rank, batch_size, count)) for rank in range(count)]
    assert sum(rows) == batch_size
    each = f"{count} processes x {rows[0]} rows" if rows[0] == rows[-1] else " + ".join(map(str, rows)) + " rows"
    places = ", ".join(f"rank {rank}: {device}" for rank, device in enumerate(devices))
    return f"world {count}, global batch {batch_size} = {each}; {places}"


def check_same_start(named: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """*Together*: the first numbers of every tensor are the same in all processes.

    Raises:
        UsageError: they are not: another base, or another start of the adapter.
    """
    digest = hashlib.sha256()
    for name, tensor in named.items():
        digest.update(name.encode())
        digest.update(tensor.detach().flatten()[:_START].float().cpu().numpy().tobytes())
    digests = gather_bytes(digest.digest(), device)
    other = [str(rank) for rank, found in enumerate(digests) if found != digests[0]]
    if other:
        raise UsageError(f"rank {', '.join(other)} starts from other weights than rank 0: is the model the same there?")


# ---- what they tell each other ----


def gather_bytes(data: bytes, device: torch.device) -> list[bytes]:
    """*Together*: what each process hands in, by rank."""
    if world() == 1:
        return [data]
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world())]
    dist.all_gather(lengths, torch.tensor([len(data)], device=device))
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(data)] = torch.tensor(list(data), dtype=torch.uint8, device=device)
    parts = [torch.empty_like(padded) for _ in range(world())]
    dist.all_gather(parts, padded)
    return [bytes(part[: int(length)].tolist()) for part, length in zip(parts, lengths, strict=True)]


def any_of(value: bool, device: torch.device) -> bool:
    """*Together*: whether one process says so."""
    return bool(_most(int(value), device))


def _most(value: int, device: torch.device) -> int:
    if world() == 1:
        return value
    most = torch.tensor(value, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """*Together*: add up the gradients of all processes, a few million numbers in one message.

    A parameter that has a gradient nowhere keeps none. Gradients that are sharded are summed already.
    """
    bucket: list[nn.Parameter] = []
    if world() == 1:
        return
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            continue
        if bucket and (parameter.dtype != bucket[0].dtype or sum(p.numel() for p in bucket) >= BUCKET):
            _sum_bucket(bucket)
            bucket = []
        bucket.append(parameter)
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(bucket: list[nn.Parameter]) -> None:
    present = torch.tensor([p.grad is not None for p in bucket]).to(bucket[0])
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
    message = torch.cat([present, *(grad.flatten() for grad in grads)])
    dist.all_reduce(message)
    present, *parts = message.split([len(bucket), *(p.numel() for p in bucket)])
    for parameter, there, part in zip(bucket, present.tolist(), parts, strict=True):
        parameter.grad = part.view_as(parameter).clone() if there else None


# ---- sharding ----


def shard(model: Any, device: torch.device) -> nn.Module:
    """*Together*: spread a model's parameters over the processes, block by block, in place, on `device`.

    Returns:
        A copy of the model without weights (on the meta device), for `gathered`.
    """
    empty = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    skeleton = copy.deepcopy(model, dict(empty))
    mesh = init_device_mesh(device.type, (world(),))
    blocks = set(model._no_split_modules or ())
    for module in [module for module in model.modules() if type(module).__name__ in blocks]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Each process has the share of its own rows in the mean over the update, so that shares are summed.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return skeleton


def gathered(model: nn.Module, skeleton: nn.Module, device: torch.device) -> nn.Module:
    """*Together*: the whole of a sharded model, put into its `skeleton`, in every process; on `device` if it fits."""
    found = {name: whole(parameter).detach().cpu() for name, parameter in model.named_parameters()}
    filled: dict[int, nn.Parameter] = {}  # a tied parameter stays one
    for name, empty in list(skeleton.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        if id(empty) not in filled:
            filled[id(empty)] = nn.Parameter(found[name], requires_grad=empty.requires_grad)
        skeleton.get_submodule(owner)._parameters[leaf] = filled[id(empty)]
    return place(skeleton, device)


def place(model: Any, device: torch.device) -> Any:
    """Move a whole model to `device` if its weights take less than half of what is free there; else leave it."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    fits = device.type != "cuda" or 2 * size < torch.cuda.mem_get_info(device)[0]
    return model.to(device) if fits else model


def is_sharded(model: nn.Module) -> bool:
    """Whether the model computes only when all processes do."""
    return isinstance(model, FSDPModule)


def idle_passes(passes: int, device: torch.device) -> int:
    """*Together*: how many passes this process has to make beside its own `passes`, so that all make as many."""
    return _most(passes, device) - passes


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """*Together*: the tensor put together from its shards; one that is not sharded as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def collect(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """*Together*: the whole tensors in the first process, one at a time; nothing in the others."""
    kept = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if is_first():
            kept[name] = full.cpu().contiguous() if isinstance(tensor, DTensor) else full.contiguous()
    return kept


def spread_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, on the device of `like` and sharded as that is."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
