"""The training loop: updates of a model from rows of tokens.

One update takes `batch_size` rows, cut into micro-batches by their tokens. Its loss is the mean over the update's
values (`losses.reduce`), so neither the cut nor the number of processes changes the gradient. The order of the rows,
the learning rate and the position in the data follow from the seed and the step; the rest of the state is in a
checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from smidgen.adapters.base import Adapter
from smidgen.data.packing import Batch, epoch_plan
from smidgen.data.rows import TokenRows
from smidgen.errors import DataError, TrainingStopped, UsageError
from smidgen.foreign import parse_json
from smidgen.losses.reduce import mean_share
from smidgen.recipe import TrainRecipe
from smidgen.training import checkpoint, processes, zero
from smidgen.training.guards import BAD_UPDATES_IN_A_ROW, GradientGuard, Interrupted, first_bad_module
from smidgen.training.objectives import Collating, Objective
from smidgen.training.optimizers import learning_rate, make_optimizer, updates_of
from smidgen.training.optimizers.states import trainable
from smidgen.training.progress import Progress
from smidgen.training.start import Start
from smidgen.training.zero import Zero


@dataclass
class Window:
    """What happened since the last logged step: the sums of losses and of the tokens they were averaged over."""

    loss: float = 0.0
    count: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Loop:
    """Trains the parameters of `model` that need a gradient.

    Args:
        model: on its device; it is trained in place.
        rows, held_out: what it learns from and what its loss is measured on.
        how: how rows become micro-batches.
        folder: the run folder: ``log.jsonl`` and ``checkpoints/`` go there.
        state: what every checkpoint carries besides the loop's own state.
        autocast: the dtype of the arithmetic where the trained parameters are kept in a wider one; None: their own.
        learners: the tensors that are meant to learn, by name; None: those that need a gradient.
        start: tells after the first update what the time until then went to.
    """

    model: nn.Module
    objective: Objective
    rows: TokenRows
    held_out: TokenRows | None
    train: TrainRecipe
    how: Collating
    seed: int
    folder: Path
    accelerator: Accelerator
    state: Mapping[str, Any] = field(default_factory=dict)
    autocast: torch.dtype | None = None
    learners: Mapping[str, nn.Parameter] | None = None
    start: Start | None = None
    step: int = field(default=0, init=False)
    held_out_loss: float | None = field(default=None, init=False)  # as last evaluated

    def __post_init__(self) -> None:
        self.guard = GradientGuard(self.learners or trainable(self.model))
        if not self.rows.supervised_counts.sum():
            raise DataError(f"0 supervised tokens in {len(self.rows):,} rows: there is nothing to learn from")
        self.parameters = trainable(self.model)
        self.lengths = self.rows.lengths
        whole = make_optimizer(self.model, self.train, self.folder)
        self.zero = Zero(self.model, whole, self.train.max_grad_norm) if zero.asked() else None
        self.optimizer: Any = self.zero or whole
        halves = [p.dtype for p in self.model.parameters()].count(torch.float16) or self.autocast == torch.float16
        # Small gradients vanish in float16, so the loss is scaled up; the optimizer does not see it.
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=1024.0, enabled=bool(halves))
        self.updates_per_epoch = math.ceil(len(self.rows) / self.train.batch_size)
        self.total = updates_of(self.train, len(self.rows))
        self.window, self.bad, self.last_good = Window(), 0, 0
        self._asked_to_stop = False

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def resume(self, found: checkpoint.Checkpoint) -> None:
        """Go on from a checkpoint: everything is put back, and what was logged after it is forgotten."""
        found.restore(self.model, self.optimizer)
        self.step = self.last_good = found.step
        self.window = Window(**found.state["window"])
        self.scaler.load_state_dict(found.state["scaler"])
        # What fits was chosen then; rows that are cut into other micro-batches round otherwise.
        self.how = replace(self.how, token_budget=found.state["budget"])
        if self.accelerator.is_main_process:
            kept = [line for line in read_log(self.folder) if line["step"] <= self.step]
            partial = self.folder / ".log.partial"
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            os.replace(partial, self.folder / "log.jsonl")

    def fit(self) -> None:
        """Train to the last step.

        Raises:
            Interrupted: the user pressed Ctrl-C; a checkpoint was written.
            TrainingStopped: a guard stopped the run.
        """
        quiet = not self.accelerator.is_main_process
        with Progress(self.total, self.step, self.device, quiet) as self.progress, self._catching_signals():
            self.model.train()
            while self.step < self.total:
                self._update(self._rows_of(self.step))
                if self.train.save_steps and (self.step % self.train.save_steps == 0 or self.step == self.total):
                    self.save()
                if processes.any_of(self._asked_to_stop, self.device):
                    folder = self.save()
                    raise Interrupted(
                        f"stopped at step {self.step} of {self.total}; {folder} is kept. Go on with: --resume"
                    )
        self.model.eval()

    def save(self) -> Path:
        """Write a checkpoint of the present state."""
        state = {**self.state, "window": vars(self.window), "scaler": self.scaler.state_dict()}
        state["budget"] = self.how.token_budget
        folder = self.folder / "checkpoints"
        keep = self.train.save_total_limit
        written = checkpoint.save(folder, self.step, self.model, self.optimizer, state, keep)
        self.accelerator.wait_for_everyone()
        return written

    def evaluate(self) -> float:
        """The loss per supervised token of the held-out rows."""
        assert self.held_out is not None
        return evaluate(self.model, self.objective, self.held_out, self.how, self.accelerator, self.autocast)

    # ---- one update ----

    def _rows_of(self, step: int) -> list[int]:
        epoch, index = divmod(step, self.updates_per_epoch)
        return self._plan(epoch)[index]

    def _plan(self, epoch: int) -> list[list[int]]:
        if getattr(self, "_planned", None) is None or self._planned[0] != epoch:
            grouped = not self.how.packing  # packed rows need not be alike
            self._planned = (
                epoch,
                epoch_plan(self.lengths, self.train.batch_size, seed=self.seed, epoch=epoch, grouped=grouped),
            )
        return self._planned[1]

    def _loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            self.objective.prepare(self.model, batch)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return self.objective.loss(self.model, batch)

    def _update(self, update: list[int]) -> None:
        begun = time.perf_counter()
        together = self.zero is not None or processes.is_sharded(self.model)
        place = (self.accelerator, self.device)
        batches, idle = _passes(together, self.objective, self.rows, update, self.how, *place)
        mine = [sum(self.objective.count(batch) for batch in batches), sum(len(batch.rows) for batch in batches)]
        count, rows = self._sum(torch.tensor(mine, device=self.device)).tolist()
        assert rows == len(update), f"{rows} rows are computed of the {len(update)} of the update"
        loss = torch.zeros((), device=self.device)
        self.optimizer.zero_grad()
        for batch in batches:
            values, _ = self._loss(batch)
            share = mean_share(values, count)
            self._backward(share)
            loss += share.detach()
        for batch in idle:
            self._backward(0 * self._loss(batch)[0].sum())
        shares = 1 if processes.is_sharded(self.model) else self.accelerator.num_processes
        for penalty in self._penalties():
            self._backward(penalty / shares)
        self._sum_gradients()
        self.scaler.unscale_(self.optimizer)
        norm = processes.whole(nn.utils.clip_grad_norm_(self.parameters.values(), self.train.max_grad_norm))
        loss_value, norm_value = self._sum(loss).item(), norm.item()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            self.scaler.update()
            self._skip(update, "loss" if not math.isfinite(loss_value) else "gradient")
            return
        self.guard.check()
        rate = learning_rate(self.train, self.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.bad, self.last_good = 0, self.step
        if self.start:
            self.start.spent("step")
            self.progress.say(self.start.line())
            self.start = None
        tokens = int(self.lengths[update].sum())
        self.window.loss += loss_value * count
        self.window.count += count
        self.window.tokens += tokens
        self.window.seconds += time.perf_counter() - begun
        self._tell(rate, norm_value)

    def _backward(self, loss: torch.Tensor) -> None:
        if self.zero:
            self.zero.backward(loss)
        else:
            self.scaler.scale(loss).backward()

    def _sum_gradients(self) -> None:
        """Over all processes; each has the share of its own rows in the mean over the update."""
        if self.zero:
            self.zero.gather_gradients()
        else:
            processes.sum_gradients(self.parameters.values())

    def _penalties(self) -> list[torch.Tensor]:
        """The terms that adapters add to the loss of an update; they are not part of the logged loss."""
        adapters = (module for module in self.model.modules() if isinstance(module, Adapter))
        return [penalty for adapter in adapters if (penalty := adapter.penalty()) is not None]

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.accelerator.reduce(tensor))  # over all processes

    def _tell(self, rate: float, norm: float) -> None:
        """Show the step; log it when it is due, with the held-out loss when that is due."""
        window, last = self.window, self.step == self.total
        speed = window.tokens / window.seconds
        self.progress.step(self.step, speed)
        due = bool(self.train.eval_steps) and self.step % (self.train.eval_steps or 1) == 0
        evaluated = self.held_out is not None and (due or last)
        if not (evaluated or last or self.step % self.train.logging_steps == 0):
            return
        line = {"step": self.step, "loss": window.loss / max(1, window.count), "lr": rate, "grad_norm": norm}
        line["tokens_per_second"] = round(speed, 1)
        text = f"{self.progress.state(self.step, speed)}  loss {line['loss']:.4f}  lr {rate:.2e}  norm {norm:.2f}"
        if evaluated:
            line["eval_loss"] = self.held_out_loss = self.evaluate()
            text += f"  held-out {line['eval_loss']:.4f}"
        self.window = Window()
        if self.accelerator.is_main_process:
            self.progress.say(text)
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
        self.accelerator.log({key: value for key, value in line.items() if key != "step"}, step=self.step)

    # ---- when something is wrong ----

    def _skip(self, update: list[int], what: str) -> None:
        """Leave out an update whose loss or gradient is not finite; name the rows and the module it came from."""
        self.bad += 1
        self.step += 1
        if self.zero:
            self.zero.forget()
        rows, module = self._blame(update)
        named = ", ".join(self.rows[index].where for index in rows) or "no single row; only together"
        self.optimizer.zero_grad()
        told = f"step {self.step}: non-finite {what} (first: {module}); rows {named}; "
        told += f"skipped ({self.bad}/{BAD_UPDATES_IN_A_ROW})"
        self.progress.say(told)
        if self.bad == BAD_UPDATES_IN_A_ROW:
            self.step = self.last_good
            kept = f"last good checkpoint: {self.save()}" if self.step else "no update was good, so nothing is kept"
            raise TrainingStopped(f"{told}\nstopped after {self.bad} bad updates in a row; {kept}")

    def _blame(self, update: list[int]) -> tuple[list[int], str]:
        """Run each row of an update alone; answer those that are not finite, and the first bad module."""
        bad, module = [], ""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            for index in update:
                (batch,) = self.objective.collate(self.rows, [index], self.how)
                batch = batch.to(self.device)
                loss = self._loss(batch)[0].sum()
                if not (loss.isfinite() and all(grad.isfinite().all() for grad in self._gradients(loss))):
                    bad.append(index)
                    module = module or self._first_bad_module(batch, loss)
        return bad, module

    def _gradients(self, loss: torch.Tensor) -> list[torch.Tensor]:
        """The gradients of a loss alone, those that there are."""
        if self.zero:  # without the hooks by which DeepSpeed takes gradients away
            found = torch.autograd.grad(loss, [*self.parameters.values()], allow_unused=True)
        else:
            self.optimizer.zero_grad()
            loss.backward()
            found = [parameter.grad for parameter in self.parameters.values()]
        return [grad for grad in found if grad is not None]

    def _first_bad_module(self, batch: Batch, loss: torch.Tensor) -> str:
        if self.zero and loss.isfinite():
            return "in the backward pass"  # DeepSpeed's hooks hide where
        return first_bad_module(self.model, lambda: self._loss(batch)[0].sum())

    @contextmanager
    def _catching_signals(self) -> Iterator[None]:
        """Let the first Ctrl-C (or a scheduler's SIGTERM) end the run after the update; the second ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, frame: object) -> None:
            self._asked_to_stop = True
            signal.signal(number, before[signal.Signals(number)])
            self.progress.say("finishing this update, then saving; press Ctrl-C again to stop at once without saving")

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    objective: Objective,
    rows: TokenRows,
    how: Collating,
    accelerator: Accelerator,
    autocast: torch.dtype | None = None,
) -> float:
    """The loss per value (for language modelling: per supervised token) of all `rows`; no logits are kept."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    order = np.argsort(rows.lengths, kind="stable").tolist()
    chunk = 256  # rows: few enough to hold their micro-batches, enough to fill them
    for start in range(0, len(order), chunk):
        indices, together = order[start : start + chunk], processes.is_sharded(model)
        batches, idle = _passes(together, objective, rows, indices, how, accelerator, device)
        for number, batch in enumerate(batches + idle):
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                objective.prepare(model, batch)
                values, _ = objective.loss(model, batch)
            if number < len(batches):
                total += values.sum().item()
                count += len(values)
    model.train(was_training)
    both = torch.tensor([total, count], dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    total, count = cast(torch.Tensor, accelerator.reduce(both)).tolist()
    return total / count


def _passes(
    together: bool,
    objective: Objective,
    rows: TokenRows,
    indices: Sequence[int],
    how: Collating,
    accelerator: Accelerator,
    device: torch.device,
) -> tuple[list[Batch], list[Batch]]:
    """The micro-batches of this process, and those that it computes to no effect, while others need it for theirs."""
    mine = indices[accelerator.process_index :: accelerator.num_processes]
    own = [batch.to(device) for batch in objective.collate(rows, mine, how)] if mine else []
    missing = processes.idle_passes(len(own), device) if together else 0
    spare = own[:1] or ([objective.collate(rows, indices[:1], how)[0].to(device)] if missing else [])
    return own, spare * missing


def read_log(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's ``log.jsonl``; none if it has no log yet. A run that was killed may leave half a line."""
    path = folder / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    logged = [parse_json(line, str(path), UsageError) for line in lines if line.endswith("\n")]
    if not all(isinstance(line, dict) and isinstance(line.get("step"), int) for line in logged):
        raise UsageError(f"{path}: damaged: each line must be an object with its step")
    return logged
