"""What transformers' Trainer, and trainers that derive from it, have to do for methods that follow the training."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from smidgen.adapters.attach import penalties, schedules
from smidgen.errors import UsageError


class AdapterCallback(TrainerCallback):
    """Adds the penalties of adapters to each update's gradients, and tells AdaLoRA of each update.

    smidgen's own loop does both by itself::

        trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[smidgen.AdapterCallback()])
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.fp16:
            raise UsageError("fp16: the penalties are not scaled as its gradients are; take bf16, or neither")
        for schedule in schedules(kwargs["model"]):
            schedule.begin(state.max_steps, kwargs["optimizer"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for penalty in penalties(kwargs["model"]):
            penalty.backward()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for schedule in schedules(kwargs["model"]):
            schedule.after_step(state.global_step + 1, kwargs["optimizer"].state)
