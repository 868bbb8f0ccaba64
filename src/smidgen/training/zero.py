"""DeepSpeed's ZeRO-2 under the optimizer: each process keeps the gradients and AdamW's states of a part of the adapter.

`accelerate launch --use_deepspeed --zero_stage 2` asks for it. DeepSpeed's own checkpoints are pickles, so they are not
used: states are gathered and set tensor by tensor. DeepSpeed is imported only here, and only then.
Source: Rajbhandari et al., ZeRO, https://arxiv.org/abs/1910.02054.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from smidgen.recipe import TrainRecipe
from smidgen.training.optimizers.states import Named

STAGE = 2
MOMENTS = ("exp_avg", "exp_avg_sq")
_VARIABLE = "ACCELERATE_USE_DEEPSPEED"


def asked() -> bool:
    """Whether accelerate's configuration asks for DeepSpeed."""
    return os.environ.get(_VARIABLE, "").lower() in ("true", "1", "yes")


@contextmanager
def hidden() -> Iterator[None]:
    """Inside, accelerate does not see that DeepSpeed is asked for: it would write and read pickles."""
    taken = os.environ.pop(_VARIABLE, None)
    try:
        yield
    finally:
        if taken is not None:
            os.environ[_VARIABLE] = taken


def problems(train: TrainRecipe, trains_base: bool) -> Iterator[str]:
    """Yield what cannot be done of what accelerate's configuration asks of DeepSpeed."""
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    instead = "leave it out and take 'fsdp: full_shard' in 'train' of the recipe, with --processes or torchrun"
    if importlib.util.find_spec("deepspeed") is None:
        yield f"DeepSpeed is not installed: pip install deepspeed, or {instead}"
    if stage != str(STAGE):
        yield f"DeepSpeed ZeRO stage {stage}: only stage {STAGE} works here; {instead}"
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        yield f"a DeepSpeed configuration file is not read here: say --zero_stage {STAGE} to accelerate, or {instead}"
    for kind in ("OPTIMIZER", "PARAM"):
        if os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{kind}_DEVICE", "none") != "none":
            yield f"DeepSpeed's offloading ({kind.lower()}) does not work here: say none, or {instead}"
    if trains_base:
        yield f"DeepSpeed trains adapters here; for full and freeze tuning {instead}"
    if train.dtype == "float16":
        yield "train.dtype: float16 does not go with DeepSpeed here; take 'dtype: bfloat16'"
    if train.optim != "adamw":
        yield f"train.optim: DeepSpeed spreads the states of adamw alone, not of {train.optim}; take 'optim: adamw'"
    if train.fsdp:
        yield "train.fsdp: DeepSpeed and FSDP both spread the training over the processes; keep one of the two"


class Zero:
    """Stands for the optimizer of a model whose trained parameters are float32.

    All processes call every method together, and make the same number of backward passes for an update.
    """

    def __init__(self, model: nn.Module, optimizer: Named, max_grad_norm: float):
        device = next(model.parameters()).device
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        self._deepspeed: Any = importlib.import_module("deepspeed")
        self._deepspeed.utils.logger.setLevel(logging.WARNING)
        config = {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed has to be told; the loop cuts its own micro-batches
            "gradient_accumulation_steps": 1,
            "zero_optimization": {"stage": STAGE},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": max_grad_norm,
        }
        self.named, self.layout = optimizer.named, optimizer.layout
        self._optimizer = optimizer
        self._engine: Any = self._deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        for group in optimizer.param_groups:
            for part in group["params"]:
                zeros = {what: torch.zeros_like(part) for what in MOMENTS}
                optimizer.state[part] = {"step": torch.zeros((), device=part.device)} | zeros
        # DeepSpeed would do so after the first group's first step, and miss the states of other groups.
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def zero_grad(self) -> None:
        for parameter in self.named.values():
            parameter.grad = None

    def backward(self, loss: torch.Tensor, last: bool = False) -> None:
        """Add the gradients of one pass of an update."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)  # DeepSpeed divides by it

    def gather_gradients(self) -> None:
        """After the last pass: give every parameter its whole gradient, to look at."""
        self.backward(0 * self._sum(), last=True)  # a pass that changes nothing ends the update
        gradients = {
            name: self._deepspeed.utils.safe_get_full_grad(parameter) for name, parameter in self.named.items()
        }
        for name, gradient in gradients.items():
            self.named[name].grad = gradient

    def step(self) -> None:
        """Clip the gradients and move the parameters."""
        self.zero_grad()
        self._engine.step()

    def forget(self) -> None:
        """Forget the gradients of an update: a step where one is not finite does that and nothing else."""
        self.zero_grad()
        self.backward(torch.nan * self._sum(), last=True)
        self.step()

    def _sum(self) -> torch.Tensor:
        return torch.stack([parameter.sum() for parameter in self.named.values()]).sum()

    def tensors(self) -> dict[str, torch.Tensor]:
        """AdamW's states as ``<parameter>.<what>``, whole."""
        step = next(iter(self._optimizer.state.values()))["step"]
        found = {}
        for name, parameter in self.named.items():
            found[f"{name}.step"] = step.clone()
            for what in MOMENTS:
                found[f"{name}.{what}"] = self._deepspeed.utils.safe_get_full_optimizer_state(parameter, what)
        return found

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over the parameters as they are now, and AdamW's states."""
        utils = self._deepspeed.utils
        for name, parameter in self.named.items():
            utils.safe_set_full_fp32_param(parameter, parameter.detach())
            for state in self._optimizer.state.values():
                state["step"].copy_(tensors[f"{name}.step"])
            for what in MOMENTS:
                utils.safe_set_full_optimizer_state(parameter, tensors[f"{name}.{what}"].to(parameter.device), what)
