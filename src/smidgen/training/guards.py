"""Guards: they stop a run that would end well and have learned nothing, or learned nonsense."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from smidgen.errors import TrainingStopped, UsageError

BAD_UPDATES_IN_A_ROW = 3


class Interrupted(TrainingStopped):
    """The user asked to stop; a checkpoint was written."""

    exit_code = 130


class GradientGuard:
    """Watches that every tensor that is meant to learn gets a gradient.

    A gradient may be all zero in the first update (LoRA's A stands behind a B of zeros), not in both of the first two.

    Args:
        expected: the tensors that are meant to learn, by name: those that need a gradient and, where the model has an
            adapter, all of its parameters, so that one frozen by mistake is found.
    """

    def __init__(self, expected: Mapping[str, nn.Parameter]):
        if not any(parameter.requires_grad for parameter in expected.values()):
            raise UsageError(
                "0 trainable parameters: nothing would be learned. "
                "An adapter that is loaded to be trained further goes in by --init-adapter, which makes it trainable."
            )
        self._expected = expected
        self._unmoved = set(expected)
        self._checked = 0

    def check(self) -> None:
        """Look at the gradients of an update, in the first two calls; later calls do nothing.

        Raises:
            TrainingStopped: some tensors got no gradient; the message names them.
        """
        if self._checked == 2:
            return
        self._checked += 1
        missing = [name for name, parameter in self._expected.items() if parameter.grad is None]
        self._stop(missing, "got no gradient")
        grads = {name: self._expected[name].grad for name in self._unmoved}
        self._unmoved = {name for name, grad in grads.items() if grad is not None and not grad.any()}
        if self._checked == 2:
            self._stop([name for name in self._expected if name in self._unmoved], "got a gradient of zeros twice")

    def _stop(self, names: list[str], what: str) -> None:
        if names:
            shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise TrainingStopped(
                f"{len(names)} of {len(self._expected)} trainable tensors {what}: {shown}. "
                "They would stay as they are. Are their modules frozen, detached or unused by the model?"
            )


def first_bad_module(model: nn.Module, loss: Callable[[], torch.Tensor]) -> str:
    """The name of the module where a non-finite value first appears.

    Args:
        loss: runs the model on what went wrong and answers the scalar loss.

    The forward pass is searched first. If all its values are finite, the gradient spreads from the last module to the
    first, so the last one whose parameters have a non-finite gradient is where it began.
    """
    found: list[str] = []

    def look(name: str) -> Callable:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not found and not all(t.isfinite().all() for t in tensors if isinstance(t, torch.Tensor)):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        value = loss()
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return found[0]
    if not value.isfinite():
        return "the loss"
    model.zero_grad()
    value.backward()
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    model.zero_grad()
    return (
        bad[-1].partition(".adapters.")[0].removesuffix(".weight").removesuffix(".bias")
        if bad
        else "not found again when the row was run alone"
    )


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raises TrainingStopped if a tensor that is to be saved holds a value that is not finite."""
    bad = [name for name, tensor in tensors if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise TrainingStopped(f"not saved: {len(bad)} tensors hold values that are not finite: {', '.join(bad[:10])}")


def check_disk(folder: Path, needed: int) -> None:
    """Raises UsageError if the disk of `folder` has less than `needed` bytes free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UsageError(
            f"{folder}: {needed / 1e9:.2f} GB are needed for what the run writes, {free / 1e9:.2f} GB "
            "are free. Free some space, write elsewhere with output=FOLDER, or keep fewer with train.save_total_limit=1"
        )
