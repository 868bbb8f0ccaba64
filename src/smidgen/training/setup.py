"""From a recipe to what a run needs: the model with what is trained in it, the rows, and a forecast.

`smidgen check` ends here; `smidgen train` goes on.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from smidgen import kernels
from smidgen.adapters.attach import adapters_of
from smidgen.adapters.base import OnModel, in_adapter
from smidgen.adapters.config import PeftConfig, TaskType
from smidgen.adapters.experts import untouched
from smidgen.adapters.files import saved_labels
from smidgen.adapters.init.measured import initialise_from
from smidgen.adapters.init.taken import changes_base
from smidgen.adapters.masks import score_weights
from smidgen.adapters.methods.shira import ShiraConfig
from smidgen.data.packing import epoch_plan
from smidgen.data.preference_data import Preferences
from smidgen.data.prepare import Prepared
from smidgen.data.task_rows import prepare_task
from smidgen.data.tasks import STEP_LABELS, TaskFiles, read_task
from smidgen.data.templates import choose_template
from smidgen.errors import DataError, UsageError
from smidgen.models.images import image_inputs, projectors_of, reader_of, told_halves
from smidgen.models.load import best_device, choose_dtype, load_as, load_model, stop_token_ids
from smidgen.models.peft_model import PeftModel, get_peft_model, method_of
from smidgen.models.quantize import parameter_count
from smidgen.models.resolve import resolve_model
from smidgen.models.rewards import HEADS
from smidgen.models.scores import keeps_rows_apart, shares_beginnings
from smidgen.models.tasks import classes_of, new_heads
from smidgen.models.tokens import (
    extend_vocabulary,
    let_adapter_train,
    start_rows,
    tell_adapter_lacks,
    tell_base_trained,
    untrained_tokens,
)
from smidgen.models.vocabulary import settle
from smidgen.recipe import Recipe, adapter_config
from smidgen.registry import METHODS
from smidgen.training.forgetting import General, read_general
from smidgen.training.objectives import Collating, Objective, objective_of, read_data
from smidgen.training.optimizers import check_optimizer, updates_of
from smidgen.training.plan import (
    PREFERRED_TOKENS,
    PROBE_TOKENS,
    Forecast,
    at_once,
    choose_budget,
    forecast,
    probe,
    remedy,
)
from smidgen.training.processes import check_shardable, place
from smidgen.training.reference import evaluating
from smidgen.training.start import Start

Say = Callable[[str], None]

_SAMPLED = 16  # updates, to see how much of their rows begins alike


@dataclass
class Setup:
    """A run that is ready to begin.

    base: the folder of the base model.
    how: how rows become micro-batches.
    init_adapter: the folder of an adapter that is trained further, instead of the recipe's.
    autocast: the dtype of the arithmetic where trained parameters of the base are kept in float32; else None.
    added: the ids of new tokens, each with those that its text had before.
    untrained: the ids of tokens in the data whose embedding the base never trained.
    skeleton: while the model is sharded: a copy without weights, to put it together again.
    general: rows that tell what the model is to keep.
    """

    recipe: Recipe
    base: Path
    model: Any
    tokenizer: Any
    data: Prepared | Preferences
    objective: Objective
    how: Collating
    init_adapter: Path | None = None
    autocast: torch.dtype | None = None
    added: dict[int, list[int]] = field(default_factory=dict)
    untrained: list[int] = field(default_factory=list)
    skeleton: Any = None
    general: General | None = None

    @property
    def method(self) -> Any:
        """The class of the method that the recipe names."""
        return METHODS[self.recipe.adapter["method"]].load()

    @property
    def trains_base(self) -> bool:
        """Whether parameters of the base model are trained, and no adapter."""
        return hasattr(self.method, "select") and not self.init_adapter

    @property
    def learners(self) -> dict[str, nn.Parameter]:
        """The tensors that are meant to learn, by name: also those of the adapter that do not need a gradient."""
        own = None if self.trains_base else self.model.active_adapter
        named = self.model.named_parameters()
        return {name: p for name, p in named if p.requires_grad or (own and in_adapter(name, own))}


def prepare(
    recipe: Recipe,
    init_adapter: Path | None,
    say: Say,
    device: torch.device | None = None,
    start: Start | None = None,
) -> Setup:
    """Load the base model and make the rows; nothing is trainable yet.

    Raises:
        UsageError: whatever is wrong with the model or the data.
    """
    check_optimizer(recipe.train.optim, device or best_device())
    base = resolve_model(recipe.model, say=say)
    device, dtype, loading = device or best_device(), recipe.train.dtype, device
    if recipe.train.fsdp:
        # A model that is to be sharded may be too large for one device: loaded beside it, it moves there in parts.
        check_shardable(base)
        dtype, loading = str(choose_dtype(dtype, device)[0]).removeprefix("torch."), torch.device("cpu")
    files, labels = read_labels(recipe, base, init_adapter)
    model, tokenizer = load_model(base, **load_as(recipe, dtype, device), labels=labels, device=loading, say=say)
    if heads := new_heads(model):
        say(f"new: {', '.join(heads)}, made at random; trained and saved with the rest")
    added = extend_vocabulary(model, tokenizer, recipe.data, init_adapter, say)
    if recipe.data.template:
        tokenizer.chat_template = choose_template(tokenizer, recipe.data.template, "").text
    model = place(model, device)
    start = start or Start()
    start.spent("model")
    reader = reader_of(model)
    if files:
        steps = recipe.objective == "process_reward"
        task, names = ("process_reward", STEP_LABELS) if steps else (recipe.task, labels)
        data = prepare_task(files, recipe.data, task, tokenizer, names, say)
    else:
        data = read_data(recipe, tokenizer, stop_token_ids(model, tokenizer), say, reader)
    for line in [*data.report.lines(), *(data.audit.lines() if isinstance(data, Preferences) else [])]:
        say(line)
    general = read_general(recipe, tokenizer, stop_token_ids(model, tokenizer), say)
    method = METHODS[recipe.adapter["method"]].load()
    if init_adapter:
        method = method_of(PeftConfig.from_pretrained(init_adapter))
    images = bool(data.train.rows.images or (data.eval and data.eval.rows.images))
    if images and issubclass(method, OnModel):
        raise DataError(f"data: rows have images, and {method.__name__} stands around the tokens alone; take lora")
    packing = recipe.model_task == "causal_lm" and _packing(recipe.data.packing, model, method, images, say)
    preferred = recipe.train.micro_batch_tokens or PREFERRED_TOKENS[model.device.type]
    how = Collating(max(preferred, int(data.train.lengths.max())), packing, cast(int, tokenizer.pad_token_id))
    setup = Setup(recipe, base, model, tokenizer, data, objective_of(recipe), how, init_adapter, general=general)
    used = set(data.train.rows.ids.tolist()) - {reader.token_id if reader else None}  # images take that token's place
    setup.added, setup.untrained = added, untrained_tokens(model, tokenizer, used)
    start.spent("data")
    return setup


def read_labels(recipe: Recipe, base: Path, init_adapter: Path | None) -> tuple[TaskFiles | None, Sequence[str]]:
    """Read the rows of a task with labels, and choose the order of the classes.

    It is that of the adapter that is trained further; else that of the base, where it knows all labels of the data;
    else the sorted names.
    """
    if recipe.objective in HEADS:
        steps = recipe.objective == "process_reward"
        return read_task(recipe.data, recipe.objective, recipe.seed) if steps else None, [HEADS[recipe.objective]]
    if recipe.task == "causal_lm":
        return None, ()
    files = read_task(recipe.data, recipe.task, recipe.seed)
    known = saved_labels(init_adapter) if init_adapter else classes_of(base)
    return files, known if init_adapter or set(files.labels) <= set(known) else files.labels


def _packing(asked: bool | None, model: Any, method: Any, images: bool, say: Say) -> bool:
    """Whether rows share sequences: by themselves where attention pays for no more than each row by itself.

    Raises:
        DataError: it is asked for, and the model mixes such rows, or rows have images.
    """
    if asked and images:
        raise DataError("data.packing: rows with images are not packed; leave it out")
    if asked is not None:
        packing, reason = asked, "as asked"
    elif images:
        packing, reason = False, "rows have images"
    elif issubclass(method, OnModel):
        packing, reason = False, "this method stands around whole rows"
    elif model.device.type == "cpu" and kernels.instruction_set() != "reference":
        packing, reason = True, "attention computes each row by itself"
    else:
        packing, reason = False, "attention would pay for the whole sequence, and rows of like length need no padding"
    if packing and not keeps_rows_apart(model):
        if asked:
            raise DataError("data.packing: this model mixes rows that share a sequence; write 'packing: false'")
        packing, reason = False, "this model mixes rows that share a sequence"
    say(f"packing: {'on' if packing else 'off'} ({reason})")
    return packing


def make_trainable(setup: Setup, say: Say) -> None:
    """Attach the recipe's adapter, or the one of a folder, or free the base parameters that the method names."""
    model, recipe = setup.model, setup.recipe
    model.requires_grad_(False)
    if setup.trains_base:
        setup.autocast = free_base(model, setup.method, adapter_config(recipe.adapter))
        settle(model)
        tell_base_trained(model, setup.tokenizer, setup.added, setup.untrained, say)
    else:
        if setup.init_adapter:
            PeftModel.from_pretrained(model, setup.init_adapter, is_trainable=True)
            say(f"adapter: taken from {setup.init_adapter}, and trained further")
            tell_adapter_lacks(model, setup.tokenizer, setup.untrained, say)
        else:
            config = adapter_config(recipe.adapter)
            if config.modules_to_save is None and not issubclass(setup.method, OnModel):
                config.modules_to_save = projectors_of(model) or None
            if recipe.model_task != "causal_lm":
                config.task_type = TaskType(recipe.model_task.upper())
                config.modules_to_save = [*(config.modules_to_save or ()), *new_heads(model)] or None
            if getattr(config, "is_measured", False):
                _measure_start(setup, config, say)
            let_adapter_train(model, setup.tokenizer, setup.method, config, setup.added, setup.untrained, say)
            get_peft_model(model, config)
            start_rows(model, {**dict.fromkeys(setup.untrained, ()), **setup.added})
        counts = Counter(
            path.rpartition(".")[2] or "the whole model" for path, _ in adapters_of(model, model.active_adapter)
        )
        say(f"targets: {', '.join(f'{name} {count}' for name, count in counts.items())}")
        if left := untouched(model, model.active_adapters):
            say(left)
    for line in told_halves(model):
        say(line)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = parameter_count(model)
    say(f"trainable: {trained:,} of {total:,} parameters ({100 * trained / total:.2f}%)")
    if recipe.train.gradient_checkpointing:
        checkpoint_layers(model)


def _measure_start(setup: Setup, config: Any, say: Say) -> None:
    """Compute how an adapter starts from the first micro-batches of the training data, or from the base's own files.

    For SHiRA that is which entries it trains.

    Raises:
        UsageError: the start stores the base anew, or cannot be computed.
    """
    if changes_base(config):
        raise UsageError(
            "adapter.loftq_config.loftq_iter: more than 1 stores the base anew, and a run saves the adapter alone; "
            "take 1"
        )
    rows, train = setup.data.train, setup.recipe.train
    updates = epoch_plan(rows.lengths, train.batch_size, seed=setup.recipe.seed, epoch=0, grouped=False)
    batches = (batch for update in updates for batch in setup.objective.collate(rows, update, setup.how))
    names = ("input_ids", "labels", "attention_mask", "position_ids")
    arguments = []
    if getattr(config, "init_lora_weights", None) != "loftq":
        for batch in islice(batches, config.init_batches):
            tensors = vars(batch.to(setup.model.device))
            arguments.append({name: tensors[name] for name in names if tensors[name] is not None})
            if batch.images:
                arguments[-1] |= image_inputs(setup.model, batch.images)
    if isinstance(config, ShiraConfig):
        config.scores = score_weights(setup.model, config, arguments)
        say(f"mask: {config.mask_type} from {len(arguments)} batches")
    else:
        initialise_from(setup.model, config, arguments, setup.base, say)


def free_base(model: nn.Module, method: Any, config: Any) -> torch.dtype | None:
    """Let the base parameters that a method selects, and new heads, be trained, in float32.

    Returns:
        The dtype of the arithmetic, where that is another one: small steps vanish in 16 bits, so what is trained is
        kept in 32, and the arithmetic stays as it was.
    """
    autocast, chosen = None, set(method.select(model, config))
    chosen |= {
        f"{head}.{name}" for head in new_heads(model) for name, _ in model.get_submodule(head).named_parameters()
    }
    for name, parameter in model.named_parameters():
        if name in chosen:
            if parameter.dtype != torch.float32:
                autocast, parameter.data = parameter.dtype, parameter.data.float()
            parameter.requires_grad_(True)
    return autocast


def checkpoint_layers(model: Any) -> None:
    """Let a model keep little of each layer and compute it again in the backward pass."""
    # Not reentrant: it needs no gradient at the inputs, which a frozen base does not have.
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # it has a newer name, not yet in 5.0
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def plan(setup: Setup, say: Say) -> Forecast:
    """Forecast memory and time, choose how much is computed at once where the recipe does not say, and tell both.

    Raises:
        UsageError: nothing is trainable.
    """
    if not any(parameter.requires_grad for parameter in setup.model.parameters()):
        raise UsageError("0 trainable parameters: nothing would be learned")
    setup.objective.begin(setup.model, as_base=not (setup.init_adapter or setup.added or setup.untrained))
    train, rows = setup.recipe.train, setup.data.train
    updates = updates_of(train, len(rows))
    # Copies of trained weights and their gradients do not grow with the tokens: then the pass is as large as the run's.
    tokens = at_once(rows, setup.how, train.batch_size) if setup.trains_base else PROBE_TOKENS
    taken = probe(setup.model, setup.objective, rows, setup.how, setup.autocast, tokens)
    if train.micro_batch_tokens is None:
        setup.how = choose_budget(setup.model, taken, rows, setup.how, train, updates)
    found = forecast(setup.model, taken, rows, setup.how, train, updates)
    say(f"updates: {updates:,} of {train.batch_size} rows")
    needed = found.free if not found.fits else found.missing - 1
    advice = remedy(setup.model, taken, rows, setup.how, train, updates, needed)
    found = replace(found, remedy=advice)
    with evaluating(setup.model):
        # Not before the probe, whose rows are copies of one and would share nearly all.
        setup.how = replace(setup.how, sharing=setup.how.packing and shares_beginnings(setup.model))
    if share := _shared(setup):
        say(f"shared: {share:.0%} of the tokens are beginnings that rows have in common, and are computed once")
        found = replace(found, tokens=found.tokens and found.tokens * (1 - share))
    for line in found.lines():
        say(line)
    return found


def _shared(setup: Setup) -> float:
    """The share of the first updates' tokens that is not computed, since other rows begin alike."""
    if not setup.how.sharing:
        return 0.0
    rows, computed, whole = setup.data.train, 0, 0
    updates = epoch_plan(rows.lengths, setup.recipe.train.batch_size, seed=setup.recipe.seed, epoch=0, grouped=False)
    for update in updates[:_SAMPLED]:
        computed += sum(batch.input_ids.numel() for batch in setup.objective.collate(rows, update, setup.how))
        whole += int(rows.lengths[update].sum())
    return 1 - computed / whole
