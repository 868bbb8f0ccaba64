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

from smidgen.adapters.attach import penalties, schedules
from smidgen.data.packing import epoch_plan
from smidgen.errors import DataError, TrainingStopped, UsageError
from smidgen.foreign import parse_json
from smidgen.losses.reduce import mean_share
from smidgen.proofs import wilson
from smidgen.recipe import TrainRecipe
from smidgen.training import checkpoint, processes, zero
from smidgen.training.forgetting import Controls
from smidgen.training.guards import BAD_UPDATES_IN_A_ROW, GradientGuard, Interrupted, first_bad_module
from smidgen.training.objectives import Collating, Losses, Objective
from smidgen.training.optimizers import learning_rate, make_optimizer, updates_of
from smidgen.training.optimizers.states import trainable
from smidgen.training.progress import Progress
from smidgen.training.start import Start
from smidgen.training.watch import Watch
from smidgen.training.zero import Zero

# Metrics that are told with each step that is logged; all are in the log.
ACCURACY = "rewards/accuracies"
SHOWN = (ACCURACY, "rewards/margins")


@dataclass
class Window:
    """What happened since the last logged step: the sums of losses and of the tokens they were averaged over.

    metrics: of each metric the sum and the number of its values.
    """

    loss: float = 0.0
    count: int = 0
    tokens: int = 0
    seconds: float = 0.0
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, total: float, count: float) -> None:
        """Add the sum of some values of a metric, and their number."""
        before = self.metrics.get(name, [0.0, 0.0])
        self.metrics[name] = [before[0] + total, before[1] + count]

    def means(self) -> dict[str, float]:
        """The mean of each metric that had a value."""
        return {name: total / count for name, (total, count) in self.metrics.items() if count}


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
        watch: looks at the policy when a step is logged and before a checkpoint, and may stop the run.
        controls: what holds the training to what the model could before.
    """

    model: nn.Module
    objective: Objective
    rows: Any
    held_out: Any
    train: TrainRecipe
    how: Collating
    seed: int
    folder: Path
    accelerator: Accelerator
    state: Mapping[str, Any] = field(default_factory=dict)
    autocast: torch.dtype | None = None
    learners: Mapping[str, nn.Parameter] | None = None
    start: Start | None = None
    watch: Watch | None = None
    controls: Controls | None = None
    step: int = field(default=0, init=False)
    measured: dict[str, float] | None = field(default=None, init=False)  # of the held-out rows, as last evaluated

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
        for schedule in schedules(self.model):
            schedule.begin(self.total, self.optimizer)
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
            # What was measured at the end, without a loss, is measured again.
            kept = [line for line in read_log(self.folder) if line["step"] <= self.step and "loss" in line]
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
                    self._heed(self.watch.look() if self.watch else {})
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

    def evaluate(self) -> dict[str, float]:
        """The loss per value of the held-out rows, and the objective's metrics."""
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

    def _loss(self, objective: Objective, batch: Any) -> Losses:
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return objective.loss(self.model, batch)

    def _prepare(self, objective: Objective, batches: list[Any], *total: Any) -> list[Any]:
        with torch.no_grad(), torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return objective.prepare(self.model, batches, *total)

    def _add_gradients(
        self, objective: Objective, rows: Any, update: Sequence[int], how: Collating
    ) -> tuple[int, torch.Tensor]:
        """Of the mean over the values of some rows; answer how many values they are, and the sums of `_sums`."""
        together = self.zero is not None or processes.is_sharded(self.model)
        batches, idle = _passes(together, objective, rows, update, how, self.accelerator, self.device)
        mine = [sum(objective.count(batch) for batch in batches), sum(len(batch.rows) for batch in batches)]
        count, computed = self._sum(torch.tensor(mine, device=self.device)).tolist()
        assert computed == len(update), f"{computed} rows are computed of the {len(update)} of the update"
        names = objective.metrics
        sums = torch.zeros(1 + 2 * len(names), device=self.device)
        for batch in self._prepare(objective, batches, self._sum):
            values, _, metrics = self._loss(objective, batch)
            share = mean_share(values, count)
            self._backward(share)
            sums += _sums(share, names, metrics)
        for batch in self._prepare(objective, idle):
            self._backward(0 * self._loss(objective, batch).values.sum())
        return count, sums

    def _update(self, update: list[int]) -> None:
        begun = time.perf_counter()
        names, tokens = self.objective.metrics, int(self.lengths[update].sum())
        self.optimizer.zero_grad()
        count, sums = self._add_gradients(self.objective, self.rows, update, self.how)
        controls = self.controls
        if controls and (general := controls.draw(self.step, tokens)):
            _, more = self._add_gradients(controls, general, range(len(general)), controls.how)
            sums, names = torch.cat([sums, more[1:]]), (*names, *controls.metrics)
            tokens += int(general.lengths.sum())
        shares = 1 if processes.is_sharded(self.model) else self.accelerator.num_processes
        held = [*penalties(self.model), *(controls.penalties() if controls else [])]
        for penalty in held:  # they are not part of the logged loss
            self._backward(penalty / shares)
        self._sum_gradients()
        self.scaler.unscale_(self.optimizer)
        norm = processes.whole(nn.utils.clip_grad_norm_(self.parameters.values(), self.train.max_grad_norm))
        (loss_value, *totals), norm_value = self._sum(sums).tolist(), norm.item()
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
        for schedule in schedules(self.model):
            schedule.after_step(self.step, self.optimizer.state)
        self.bad, self.last_good = 0, self.step
        if self.start:
            self.start.spent("step")
            self.progress.say(self.start.line())
            self.start = None
        self.window.loss += loss_value * count
        self.window.count += count
        self.window.tokens += tokens
        self.window.seconds += time.perf_counter() - begun
        for at, name in enumerate(names):
            self.window.add(name, totals[2 * at], totals[2 * at + 1])
        if held:
            self.window.add("penalty", sum(processes.whole(penalty.detach()).item() for penalty in held), 1)
        self._tell(rate, norm_value)

    def _heed(self, seen: dict[str, float]) -> None:
        """Raises TrainingStopped if something is wrong with what the watch saw."""
        if self.watch and (alarms := self.watch.alarms(seen)):
            found = checkpoint.latest(self.folder / "checkpoints")
            kept = f"last checkpoint: {found.folder}" if found else "no checkpoint was kept; set train.save_steps"
            raise TrainingStopped(
                f"stopped at step {self.step}: {'; '.join(alarms)}; {kept}. Lower train.learning_rate, or raise "
                "preference.beta"
            )

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
        line |= {"tokens_per_second": round(speed, 1)} | window.means()
        seen = self.watch.look() if self.watch else {}
        line |= seen
        if self.watch and self.watch.samples_due(self.step):
            line |= self.watch.sample(self.step)
        text = f"{self.progress.state(self.step, speed)}  loss {line['loss']:.4f}  lr {rate:.2e}  norm {norm:.2f}"
        shown = [name for name in SHOWN if name in line]
        text += "".join(f"  {name.rpartition('/')[2]} {line[name]:.3g}" for name in shown)
        if evaluated:
            self.measured = self.evaluate()
            line |= {f"eval_{name}": value for name, value in self.measured.items()}
            text += f"  held-out {line['eval_loss']:.4f}"
        self.window = Window()
        if self.accelerator.is_main_process:
            self.progress.say(text)
        self.log(line)
        self._heed(seen)

    def log(self, line: Mapping[str, float]) -> None:
        """Write a line to the log, and tell the trackers."""
        if self.accelerator.is_main_process:
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
                (batch,) = self._prepare(self.objective, [batch.to(self.device)])
                loss = self._loss(self.objective, batch).values.sum()
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

    def _first_bad_module(self, batch: Any, loss: torch.Tensor) -> str:
        if self.zero and loss.isfinite():
            return "in the backward pass"  # DeepSpeed's hooks hide where
        return first_bad_module(self.model, lambda: self._loss(self.objective, batch).values.sum())

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
    rows: Any,
    how: Collating,
    accelerator: Accelerator,
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """The `loss` per value (for language modelling: per supervised token) of all `rows`, and the objective's metrics.

    A share of right answers has its 95 % interval beside it, `.low` and `.high`. No logits are kept.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    names = ("loss", *objective.metrics)
    wide = torch.float32 if device.type == "mps" else torch.float64
    sums = torch.zeros(2 * len(names), dtype=wide, device=device)
    order = np.argsort(rows.lengths, kind="stable").tolist()
    chunk = 256  # rows: few enough to hold their micro-batches, enough to fill them
    for start in range(0, len(order), chunk):
        indices, together = order[start : start + chunk], processes.is_sharded(model)
        batches, idle = _passes(together, objective, rows, indices, how, accelerator, device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            for batch in objective.prepare(model, batches, lambda tensor: cast(Any, accelerator.reduce(tensor))):
                values, _, metrics = objective.loss(model, batch)
                sums += _sums(None, names, {"loss": values, **metrics}).to(wide)
            for batch in objective.prepare(model, idle):
                objective.loss(model, batch)
    model.train(was_training)
    found = cast(torch.Tensor, accelerator.reduce(sums)).tolist()
    measured = {name: found[2 * at] / found[2 * at + 1] for at, name in enumerate(names) if found[2 * at + 1]}
    if ACCURACY in measured:
        at = 2 * names.index(ACCURACY)
        low, high = wilson(round(found[at]), round(found[at + 1]))
        measured |= {f"{ACCURACY}.low": low, f"{ACCURACY}.high": high}
    return measured


def _sums(share: torch.Tensor | None, names: Sequence[str], metrics: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The share of a loss, if there is one, then of each metric the sum and the number of its values."""
    parts = [] if share is None else [share.detach().float()]
    for name in names:
        values = metrics[name].float()
        parts += [values.sum(), values.new_tensor(len(values))]
    return torch.stack(parts)


def _passes(
    together: bool,
    objective: Objective,
    rows: Any,
    indices: Sequence[int],
    how: Collating,
    accelerator: Accelerator,
    device: torch.device,
) -> tuple[list[Any], list[Any]]:
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
