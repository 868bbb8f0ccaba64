"""The parts of a recipe, as plain dataclasses: what every field is, and its default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

from pydantic import ConfigDict, Field

# Objectives that train a scalar head.
REWARDS = ("reward", "process_reward")

Positive: TypeAlias = Annotated[int, Field(ge=1)]
Share: TypeAlias = Annotated[float, Field(gt=0, lt=1)]

# An optimizer's name says its rule, whether states are in 8 bits, and whether they are paged.
Optimizer: TypeAlias = Literal[
    "adamw",
    "adamw_8bit",
    "paged_adamw",
    "paged_adamw_8bit",
    "lion",
    "lion_8bit",
    "paged_lion",
    "paged_lion_8bit",
    "adafactor",
]

FORBID = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Source:
    """One data file, or a folder of them.

    path: the file.
    weight: its share of the tokens in a mixture; all sources have one, or none has.
    columns: what the file calls the columns, where it does not use the usual names: ``{instruction: question}``.
        Where it is given, no other column is read.
    """

    path: str
    weight: Annotated[float, Field(gt=0)] | None = None
    columns: dict[str, str] | None = None

    __pydantic_config__ = FORBID


@dataclass(frozen=True)
class DataRecipe:
    """What is learned from, and how it becomes tokens.

    train, eval: the files; eval may be left out.
    eval_size: how much of train is held out when `eval` is not given: a share below 1, or a number of rows.
    max_length: the most tokens of one row.
    format: the name of the data format; None: detected.
    template: path of a Jinja chat template; None: the tokenizer's own.
    system: the system message of chats that have none.
    on_long: what happens to a row longer than `max_length`.
    packing: whether several rows share one sequence; None: chosen, and said.
    train_on: whether the loss counts the completion alone or every token.
    limit: only the first n rows of each file.
    add_tokens, add_special_tokens: new tokens; only their rows of the embedding are trained, beside the adapter.
        Special ones are left out of decoded answers.
    """

    train: Annotated[list[Source], Field(min_length=1)]
    eval: Annotated[list[Source], Field(min_length=1)] | None = None
    eval_size: Positive | Share | None = None
    max_length: Annotated[int, Field(ge=2)] = 1024
    format: str | None = None
    template: str | None = None
    system: str | None = None
    on_long: Literal["drop", "truncate", "truncate_prompt", "error"] = "truncate_prompt"
    packing: bool | None = None
    train_on: Literal["completion", "all"] = "completion"
    limit: Positive | None = None
    add_tokens: list[Annotated[str, Field(min_length=1)]] | None = None
    add_special_tokens: list[Annotated[str, Field(min_length=1)]] | None = None

    __pydantic_config__ = FORBID


@dataclass(frozen=True)
class TrainRecipe:
    """How the parameters are moved.

    batch_size: rows per update, however they are cut into micro-batches and spread over processes.
    micro_batch_tokens: the most tokens computed at once; None: chosen from the memory there is.
    max_steps: the number of updates; it takes precedence over `epochs`.
    loraplus_lr_ratio: LoRA+: how many times the learning rate B matrices and vectors learn at; None: as the others.
    loraplus_lr_embedding: with LoRA+, the learning rate of LoRA on embeddings.
    warmup_ratio: the share of the updates in which the learning rate rises.
    eval_steps: updates between two evaluations; None: at the end only.
    save_steps: updates between two checkpoints; None: only when the run is stopped (what was learned is saved anyway).
    save_total_limit: how many checkpoints are kept; None: all.
    report_to: names of trackers: tensorboard, wandb, mlflow, trackio...
    fsdp: "full_shard": parameters, gradients and optimizer states are spread over the processes.
    """

    epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Positive | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    batch_size: Positive = 16
    micro_batch_tokens: Positive | None = None
    optim: Optimizer = "adamw"
    loraplus_lr_ratio: Annotated[float, Field(gt=0)] | None = None
    loraplus_lr_embedding: Annotated[float, Field(gt=0)] = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    gradient_checkpointing: bool = False
    logging_steps: Positive = 10
    eval_steps: Positive | None = None
    save_steps: Positive | None = None
    save_total_limit: Positive | None = None
    report_to: list[str] = field(default_factory=list)
    fsdp: Literal["full_shard"] | None = None

    __pydantic_config__ = FORBID


@dataclass(frozen=True)
class PreferenceRecipe:
    """What is learned from preferences, and how far from the reference; None: the loss's own value.

    loss_type: names in `smidgen.losses.preference.LOSSES`; of several the sum is taken, by `loss_weights`.
    beta, label_smoothing, epsilon, discopop_tau, simpo_gamma: options of the losses that have them.
    f_divergence_type, f_alpha_divergence_coef: by what the policy is held to the reference.
    rpo_alpha: the weight of the cross-entropy of the chosen answer, which is added.
    ld_alpha: how much tokens beyond the length of the pair's other answer count.
    desirable_weight, undesirable_weight: of KTO's rows.
    ref_model: another model as the reference; None: the policy as it starts.
    precompute_ref_log_probs: all log-probabilities of the reference are computed before the training, and kept.
    """

    loss_type: Annotated[list[str], Field(min_length=1)] = field(default_factory=lambda: ["sigmoid"])
    loss_weights: list[float] | None = None
    beta: float | None = None
    label_smoothing: float | None = None
    epsilon: float | None = None
    discopop_tau: float | None = None
    simpo_gamma: float | None = None
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 1.0
    rpo_alpha: Annotated[float, Field(gt=0)] | None = None
    ld_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    desirable_weight: Annotated[float, Field(gt=0)] = 1.0
    undesirable_weight: Annotated[float, Field(gt=0)] = 1.0
    ref_model: Annotated[str, Field(min_length=1)] | None = None
    precompute_ref_log_probs: bool = False

    __pydantic_config__ = FORBID


@dataclass(frozen=True)
class RewardRecipe:
    """How a reward model learns.

    center_rewards_coefficient: the weight of the square of the sum of a pair's scores, which holds them around 0.
    """

    center_rewards_coefficient: Annotated[float, Field(ge=0)] = 0.0

    __pydantic_config__ = FORBID


@dataclass(frozen=True)
class WatchRecipe:
    """What stops a training on preferences that goes wrong, and what is looked at on the way; None: not watched.

    max_kl: nats a token from the policy as it started.
    min_entropy: the least share of the entropy at the start.
    max_fall: nats a token by which the chosen answers may have become less likely, if they go on falling:
        `patience` looks in a row.
    samples_steps: updates between samples beside those of the start.
    refusals: whether refusals of harmless questions are counted before and after.
    """

    max_kl: Annotated[float, Field(gt=0)] | None = 5.0
    min_entropy: Share | None = 0.05
    max_fall: Annotated[float, Field(gt=0)] | None = 1.0
    patience: Positive = 3
    samples_steps: Positive | None = None
    refusals: bool = True

    __pydantic_config__ = FORBID


@dataclass(frozen=True)
class GeneralRecipe:
    """What the model could before and is to keep; 0 switches a control off.

    data: files of general texts or chats.
    eval_size: how much of them is held out and measured before and after: a share below 1, or a number of rows.
    share: the share of general data in the tokens of every update, learned beside the objective's own.
    ewc: Elastic Weight Consolidation: how much the trained parameters are held to their start, each by its Fisher
        information.
    l2: the same for all parameters alike.
    kl: the weight of the KL from the base, on general text, to the model that is trained.
    """

    data: Annotated[list[Source], Field(min_length=1)] | None = None
    eval_size: Positive | Share = 0.1
    share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    ewc: Annotated[float, Field(ge=0)] = 0.0
    l2: Annotated[float, Field(ge=0)] = 0.0
    kl: Annotated[float, Field(ge=0)] = 0.0

    __pydantic_config__ = FORBID
