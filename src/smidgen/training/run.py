"""A recipe becomes a run: a folder with the trained adapter or model, the log, the proof and a report.

    recipe.yaml        the recipe with every default written out
    environment.json   versions, machine, dtype
    log.jsonl          one line for each logged step
    samples.jsonl      answers on the way beside those of the start, where `watch.samples_steps` asks for them
    checkpoints/       step-N, see `training.checkpoint`
    memory.json        bytes by what they were for: as forecast, and the peak as measured
    adapter/ or model/ what was trained, with the tokenizer, its chat template and the stop tokens
    record.json        what `smidgen verify` and `smidgen lineage` have to find again from these files
    proof.json         what was checked at the end, with numbers, and samples

`smidgen train` adds ``report.html``, the same for people (`evaluation.report`).
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import platform
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from torch import nn

from smidgen import threads
from smidgen.data.rows import TokenRows
from smidgen.errors import TrainingStopped, UsageError
from smidgen.models.fingerprint import fingerprint
from smidgen.models.fuse import fused
from smidgen.models.lineage import Lineage, begin_lineage
from smidgen.models.load import best_device, stop_token_ids
from smidgen.models.save import save_complete
from smidgen.recipe import Recipe, difference, load_recipe, recipe_hash
from smidgen.registry import METHODS
from smidgen.training import checkpoint, processes, proof, zero
from smidgen.training.forgetting import Controls, General, check_kept, row_sums
from smidgen.training.guards import check_disk, check_finite
from smidgen.training.loop import Loop
from smidgen.training.memory import PeakMemory, give_back, keep_freed, telling_out_of_memory
from smidgen.training.optimizers import updates_of
from smidgen.training.optimizers.states import is_paged, state_bytes
from smidgen.training.plan import size_text
from smidgen.training.preference import settle_reference
from smidgen.training.setup import Say, Setup, make_trainable, plan, prepare
from smidgen.training.start import Start
from smidgen.training.watch import Watch, check_refusals, counted

PARTS = (
    "recipe.yaml",
    "environment.json",
    "log.jsonl",
    "samples.jsonl",
    "checkpoints",
    "adapter",
    "model",
    "memory.json",
    "record.json",
    "proof.json",
    "report.html",
    "trackers",
)
PACKAGES = ("smidgen", "torch", "transformers", "tokenizers", "accelerate", "safetensors", "numpy")
# Changing these changes nothing that is learned, so a run may be resumed with other values.
FREE_ON_RESUME = (
    "output",
    *(f"train.{name}" for name in ("logging_steps", "eval_steps", "save_steps", "save_total_limit", "report_to")),
)


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    init_adapter: Path | None = None,
    say: Say = print,
    start: Start | None = None,
) -> proof.Proof:
    """Carry out a recipe and answer the proof, which is also in the run folder.

    Args:
        resume: go on from the newest checkpoint in the run folder.
        overwrite: replace the run that is in the folder.
        init_adapter: folder of an adapter, or of the run that made it, to train further, instead of a new one of the
            recipe's.
        start: what was spent before this call counts for the time of the first update; None: from this call on.

    Raises:
        UsageError: nothing was started; the message says what to change.
        TrainingStopped: a guard, or the user, stopped the run.
    """
    start = start or Start()
    give_back()
    keep_freed(True)
    folder = Path(recipe.output)
    accelerator = _accelerator(recipe, folder)
    with accelerator.main_process_first():
        found = _open_folder(folder, recipe, resume, overwrite)
    if found:
        processes.check_number(found.state)
    _start_trackers(accelerator, recipe)
    if found and not init_adapter and found.state.get("init_adapter"):
        init_adapter = Path(found.state["init_adapter"])
    if init_adapter and (init_adapter / "adapter").is_dir():
        init_adapter /= "adapter"
    if not accelerator.is_main_process:
        say = _silent
    if accelerator.device.type == "cpu":
        say(threads.told(torch.get_num_threads()))
    if joined := processes.introduce(accelerator, recipe.train.batch_size):
        say(joined)
    set_seed(recipe.seed)
    start.spent("imports")
    with accelerator.main_process_first():  # what the first puts into the cache, the others find there
        setup = prepare(recipe, init_adapter, say, accelerator.device, start)
    base, lineage = fingerprint(setup.model), begin_lineage(recipe, init_adapter, folder)
    before = proof.measure(setup, accelerator) if setup.trains_base else None
    refused = counted(setup)
    make_trainable(setup, say)
    start.spent("adapter")
    if accelerator.num_processes > 1:
        processes.check_same_start(dict(setup.model.named_parameters()), accelerator.device)
        set_seed(recipe.seed, device_specific=True)  # each drops other units
    before_training = proof.snapshot(setup.learners)
    general = setup.general
    could = _general_losses(setup, general) if general else None
    with ExitStack() as kernels:
        if not recipe.train.fsdp:
            kernels.enter_context(fused(setup.model, say))
        start.spent("kernels tried")
        loop = _fit(setup, folder, accelerator, found, lineage, say, start)

        if setup.trains_base:
            kernels.close()  # the weights stand by themselves again, to be rounded and saved
        # Rounding changes what was evaluated last, training is over otherwise.
        known = None if setup.autocast else loop.measured
        _narrow(setup)
        saved = folder / ("model" if setup.trains_base else "adapter")
        if accelerator.is_main_process:
            _save(setup, saved)
        accelerator.wait_for_everyone()
        after = proof.measure(setup, accelerator, known)
        if before is None:
            with setup.objective.at_start(setup.model):
                before = proof.measure(setup, accelerator)
    checks = [proof.check_loss(setup, before, after), proof.check_moved(setup, before_training, loop.total)]
    if not setup.trains_base:
        checks.append(proof.check_base(base, fingerprint(setup.model)))
    if general and could is not None:
        kept = check_kept(general.eval, could, _general_losses(setup, general))
        loop.log({"step": loop.step} | {f"general/{name}": value for name, value in kept.numbers.items()})
        checks.append(kept)
    if refused is not None:
        checks.append(check_refusals(refused, counted(setup) or 0.0))
    if accelerator.is_main_process:
        proof.write_record(setup, saved, base, lineage)
        say("verifying what was saved in a fresh process")
        checks += proof.verify_afresh(folder)
    result = proof.Proof(checks, proof.samples_of(setup, before, after))
    if accelerator.is_main_process:
        result.write(folder / "proof.json")
    for line in (*result.lines(), f"saved: {saved}"):
        say(line)
    accelerator.end_training()
    return result


def _fit(
    setup: Setup,
    folder: Path,
    accelerator: Accelerator,
    found: checkpoint.Checkpoint | None,
    lineage: Lineage,
    say: Say,
    start: Start,
) -> Loop:
    """Forecast, train to the end, and keep how good the forecast was."""
    with telling_out_of_memory(lambda: "before the first step", lambda: "Try a smaller data.max_length or model"):
        forecast = plan(setup, say)
    start.spent("forecast")
    _check_space(setup, folder)
    settle_reference(setup, say)
    start.spent("reference")
    loop = _loop(setup, folder, accelerator, lineage, start, _controls(setup, say))
    if found and found.state.get("data") != loop.state["data"]:
        raise UsageError(f"cannot resume: the training data changed since {found.folder} was written")
    if found and found.state.get("parents") != loop.state["parents"]:
        raise UsageError(f"cannot resume: the adapter that it started from changed since {found.folder} was written")
    if accelerator.is_main_process:
        _write_beginnings(setup, folder)
    if found:
        loop.resume(found)
        say(f"resumed from {found.folder}: step {found.step} of {loop.total}")
    with (
        telling_out_of_memory(
            lambda: f"in step {loop.step + 1}; this was the forecast",
            lambda: "\n".join([*forecast.lines(), f"smallest change: {forecast.remedy}"]),
        ),
        PeakMemory(accelerator.device) as memory,
    ):
        loop.fit()
    say(f"memory: forecast {size_text(forecast.peak)}, measured {size_text(memory.peak)} at the peak")
    if accelerator.is_main_process:
        kept = {"forecast": forecast.bytes() | {"peak": forecast.peak}, "measured": {"peak": memory.peak}}
        (folder / "memory.json").write_text(json.dumps(kept, indent=2), encoding="utf-8")
    return loop


# ---- the run folder ----


def _open_folder(folder: Path, recipe: Recipe, resume: bool, overwrite: bool) -> checkpoint.Checkpoint | None:
    """Make sure that the folder may be written to; answer the checkpoint to go on from, if that was asked for."""
    if resume:
        found = checkpoint.latest(folder / "checkpoints")
        if found is None:
            raise UsageError(f"{folder}: no checkpoint to resume from; leave out --resume, or set train.save_steps")
        _check_same(folder, recipe, found)
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # a name that is too long, or has a character that the system refuses
        raise UsageError(f"output: {folder}: this folder cannot be made: {error}") from None
    if any(folder.iterdir()):
        foreign = sorted(path.name for path in folder.iterdir() if path.name not in PARTS)
        if foreign or not overwrite:
            remedy = (
                f"it holds more than a run ({', '.join(foreign[:3])}); name another folder: output=FOLDER"
                if foreign
                else "go on with it by --resume, replace it by --overwrite, or name another folder: output=FOLDER"
            )
            raise UsageError(f"{folder}: is not empty; {remedy}")
        shutil.rmtree(folder)
    return None


def _check_same(folder: Path, recipe: Recipe, found: checkpoint.Checkpoint) -> None:
    old, _ = load_recipe(folder / "recipe.yaml")
    changed = [
        line for line in difference(old, recipe) if not line.startswith(tuple(f"{name}:" for name in FREE_ON_RESUME))
    ]
    if changed:
        raise UsageError(
            f"cannot resume from step {found.step}, the recipe changed:\n  " + "\n  ".join(changed) + "\n"
            "Put it back, or start a new run from trained weights: --init-adapter FOLDER output=OTHER"
        )


def _write_beginnings(setup: Setup, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(setup.recipe.to_yaml(), encoding="utf-8")
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "device": str(setup.model.device),
        "threads": torch.get_num_threads(),
        "waiting": threads.waiting(),
        "dtype": str(proof.base_dtype(setup.model)).removeprefix("torch."),
    }
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            environment[package] = importlib.metadata.version(package)
    (folder / "environment.json").write_text(json.dumps(environment, indent=2), encoding="utf-8")


def _check_space(setup: Setup, folder: Path) -> None:
    """The checkpoints that are kept, one more while it is written, the result and paged states must fit on the disk."""
    train = setup.recipe.train
    total = updates_of(train, len(setup.data.train))
    written = total // train.save_steps if train.save_steps else 0
    kept = min(written, train.save_total_limit or written) + 1
    result = sum(
        p.numel() * p.element_size()
        for p in (setup.model if setup.trains_base else nn.ParameterList(setup.learners.values())).parameters()
    )
    on_disk = is_paged(train.optim) and setup.model.device.type == "cpu"
    paged = processes.world() * state_bytes(setup.model, train.optim) if on_disk else 0
    check_disk(folder, kept * checkpoint.size(setup.model, train.optim) + result + paged)


def _loop(
    setup: Setup, folder: Path, accelerator: Accelerator, lineage: Lineage, start: Start, controls: Controls
) -> Loop:
    general = setup.general.train.fingerprint + setup.general.eval.fingerprint if setup.general else ""
    state = {
        "recipe_hash": recipe_hash(setup.recipe),
        "recipe": setup.recipe.to_dict(),
        "data": setup.data.train.fingerprint + general,
        "init_adapter": str(setup.init_adapter) if setup.init_adapter else None,
        "parents": [parent.files for parent in lineage.parents],
    }
    if setup.recipe.train.fsdp:
        setup.skeleton = processes.shard(setup.model, accelerator.device)
    return Loop(
        model=setup.model,
        objective=setup.objective,
        rows=setup.data.train,
        held_out=setup.data.eval,
        train=setup.recipe.train,
        how=setup.how,
        seed=setup.recipe.seed,
        folder=folder,
        accelerator=accelerator,
        state=state,
        autocast=setup.autocast,
        learners=setup.learners,
        start=start,
        watch=_watch(setup, folder),
        controls=controls,
    )


def _controls(setup: Setup, say: Say) -> Controls:
    section, rows = setup.recipe.general, setup.general.train if setup.general else None
    controls = Controls(section, setup.model, rows, setup.how, setup.recipe.seed, setup.autocast)
    if told := controls.told():
        say(f"against forgetting: {told}")
    return controls


def _general_losses(setup: Setup, general: General) -> np.ndarray:
    """Of each general row that is held out, as the model is now."""
    return row_sums(setup.model, general.eval, setup.how, setup.autocast)


def _watch(setup: Setup, folder: Path) -> Watch | None:
    if setup.recipe.objective not in ("dpo", "kto"):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    rows = cast(TokenRows, proof.measured_rows(setup).wanted)
    return Watch(setup.recipe.watch, setup.model, setup.tokenizer, rows, folder)


def _narrow(setup: Setup) -> None:
    """Put a sharded model together; round base parameters trained in float32 to the model's own dtype, once.

    What is proved is what is saved.
    """
    if setup.skeleton is not None:
        setup.model = processes.gathered(setup.model, setup.skeleton, setup.model.device)
        setup.skeleton = None
    if setup.autocast:
        for parameter in setup.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(setup.autocast)
        setup.autocast = None


def _save(setup: Setup, folder: Path) -> None:
    """Write what was trained, with everything that is needed to use it; the folder appears complete.

    Raises:
        TrainingStopped: a tensor is not finite, or the disk is full; what was there before is as it was.
    """
    check_finite(setup.learners.items())
    tokenizer = copy.deepcopy(setup.tokenizer)
    tokenizer.chat_template = setup.data.template or tokenizer.chat_template
    try:
        save_complete(setup.model, tokenizer, stop_token_ids(setup.model, setup.tokenizer), folder)
    except OSError as error:
        kept = checkpoint.latest(folder.parent / "checkpoints")
        raise TrainingStopped(
            f"{error}. "
            + (f"Free some space and go on from step {kept.step} with --resume" if kept else "No checkpoint was kept")
        ) from error


# ---- accelerate ----


def _accelerator(recipe: Recipe, folder: Path) -> Accelerator:
    processes.check_launch(recipe.train, trains_base=hasattr(METHODS[recipe.adapter["method"]].load(), "select"))
    joining = InitProcessGroupKwargs(timeout=processes.TIMEOUT)
    trackers: list[Any] | None = [*recipe.train.report_to] or None
    cpu = processes.launched() > 1 and best_device().type == "cpu"  # it joins processes on a CPU only if told so
    try:
        with zero.hidden():
            return Accelerator(cpu=cpu, log_with=trackers, project_dir=folder / "trackers", kwargs_handlers=[joining])
    except (ValueError, ImportError) as error:
        raise UsageError(f"train.report_to: {error}") from error


def _start_trackers(accelerator: Accelerator, recipe: Recipe) -> None:
    if recipe.train.report_to:
        accelerator.init_trackers("smidgen", config={key: str(value) for key, value in vars(recipe.train).items()})


def _silent(line: str) -> None:
    """What other processes than the first say."""
