"""Objectives that learn from preferences: DPO and its kin from pairs, KTO from labelled answers.

Letters: A answers of a batch (two for each pair, the chosen one first), B pairs or labelled rows, N tokens of all
answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smidgen.data.packing import Batch, batch_of, cut
from smidgen.data.preference_rows import LabelledRows, PairRows
from smidgen.data.rows import TokenRow
from smidgen.errors import UsageError
from smidgen.losses.answers import Answers, log_ratio, sum_tokens
from smidgen.losses.preference import PreferenceLoss, kto, kto_kl, loss_of, reward_metrics
from smidgen.models.fuse import fused
from smidgen.models.load import load_as, load_model
from smidgen.models.resolve import resolve_model
from smidgen.models.scores import keeps_rows_apart, losses_at, shares_beginnings
from smidgen.recipe import Recipe
from smidgen.training.objectives import Collating, Losses, Objective, Total
from smidgen.training.reference import Reference, precompute, prove_start
from smidgen.training.setup import Say, Setup


@dataclass(frozen=True, kw_only=True)
class AnswerBatch(Batch):
    """Prompts with answers; `rows` are the indices of pairs or labelled rows.

    tokens: (A,) int64, how many each answer has.
    reference: (A,) float32, log-probabilities of the answers under the reference; None: not computed.
    """

    tokens: Tensor
    reference: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class PairBatch(AnswerBatch):
    """Pairs. mean_tokens: how many a chosen answer has, mean over the whole update."""

    mean_tokens: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LabelledBatch(AnswerBatch):
    """Labelled answers.

    desirable: (A,) bool. mismatched: the same prompts with answers to others.
    kl: a scalar, KTO's estimate over the whole update.
    """

    desirable: Tensor | None = None
    mismatched: AnswerBatch | None = None
    kl: Tensor | None = None


class _OfAnswers(Objective):
    """What pairs and labelled rows have in common: a reference, and log-probabilities of whole answers."""

    needs_reference = True

    def __init__(self) -> None:
        self.reference = Reference()

    def begin(self, model: Any, as_base: bool) -> None:
        self.reference = Reference.of(model, as_base)

    @contextmanager
    def at_start(self, model: Any) -> Iterator[None]:
        with self.reference.answering(model):
            yield

    def count(self, batch: AnswerBatch) -> int:
        return len(batch.rows)

    def log_probs(self, model: Any, batch: AnswerBatch) -> Tensor:
        """(A,) float32: the log-probability of each answer, summed over its tokens."""
        return sum_tokens(-losses_at(model, batch), batch.tokens)

    def of_reference(self, model: Any, batch: AnswerBatch) -> Tensor:
        """The same under the reference: those computed beforehand, or now."""
        if batch.reference is not None:
            return batch.reference
        with self.reference.answering(model):
            return self.log_probs(model, batch)


def _answers(rows: list[TokenRow], indices: Sequence[int], reference: Tensor | None, how: Collating) -> dict[str, Any]:
    """The fields of an `AnswerBatch` of some rows."""
    kinds = {"packing": how.packing, "pad_id": how.pad_id, "sharing": how.sharing}
    batch = batch_of(rows, indices, **kinds, most=how.token_budget)
    tokens = torch.tensor([int(row.supervised[1:].sum()) for row in rows])
    return vars(batch) | {"tokens": tokens, "reference": reference}


def _known(values: np.ndarray | None, indices: Sequence[int]) -> Tensor | None:
    return None if values is None else torch.from_numpy(values[list(indices)])


def pair_groups(
    rows: PairRows, update: Sequence[int], token_budget: int, *, packing: bool
) -> list[tuple[list[int], list[int]]]:
    """The pairs of an update in groups that are computed at once, each with the indices of both rows of its pairs."""
    each = rows.rows.lengths.reshape(-1, 2)
    padded = {index: 2 * int(each[index].max()) for index in update}
    groups = cut(rows, update, token_budget=token_budget, packing=packing, padded=padded)
    return [(group, [2 * index + side for index in group for side in (0, 1)]) for group in groups]


class Preference(_OfAnswers):
    """Learns from pairs, by a loss of `losses.preference`."""

    metrics = (
        *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
        *("logps/chosen", "logps/rejected", "tokens/chosen", "tokens/rejected"),
    )

    def __init__(self, function: PreferenceLoss, ld_alpha: float | None = None) -> None:
        super().__init__()
        self.function, self.ld_alpha = function, 1.0 if ld_alpha is None else ld_alpha
        self.needs_reference = function.needs_reference

    @classmethod
    def of(cls, recipe: Recipe) -> Preference:
        return cls(loss_of(recipe.preference), recipe.preference.ld_alpha)

    def collate(self, rows: PairRows, update: Sequence[int], how: Collating) -> list[PairBatch]:
        batches = []
        for group, both in pair_groups(rows, update, how.token_budget, packing=how.packing):
            fields = _answers([rows.rows[index] for index in both], group, _known(rows.reference, both), how)
            batches.append(PairBatch(**fields))
        return batches

    def log_probs(self, model: Any, batch: AnswerBatch) -> Tensor:
        other = batch.tokens.view(-1, 2).flip(1).flatten()
        return sum_tokens(-losses_at(model, batch), batch.tokens, other, ld_alpha=self.ld_alpha)

    def prepare(
        self, model: Any, batches: Sequence[PairBatch], total: Total = lambda tensor: tensor
    ) -> list[PairBatch]:
        device = next(model.parameters()).device
        sums = torch.zeros(2, device=device)
        for batch in batches:
            sums += torch.stack([batch.tokens[::2].sum(), torch.tensor(len(batch.rows), device=device)])
        tokens, pairs = total(sums)
        known = [self.of_reference(model, batch) if self.needs_reference else None for batch in batches]
        return [replace(b, reference=r, mean_tokens=tokens / pairs) for b, r in zip(batches, known)]

    def loss(self, model: Any, batch: PairBatch) -> Losses:
        policy, reference = self.log_probs(model, batch), batch.reference
        chosen, rejected = (
            Answers(policy[side::2], batch.tokens[side::2], None if reference is None else reference[side::2])
            for side in (0, 1)
        )
        values = self.function(chosen, rejected, mean_tokens=batch.mean_tokens)
        metrics = reward_metrics(self.function.rewards(chosen), self.function.rewards(rejected))
        for name, answers in (("chosen", chosen), ("rejected", rejected)):
            metrics |= {f"logps/{name}": answers.policy.detach(), f"tokens/{name}": answers.tokens.float()}
        return Losses(values, torch.tensor(batch.rows, device=values.device), metrics)


class Kto(_OfAnswers):
    """Learns from answers that are labelled good or bad, without pairs. https://arxiv.org/abs/2402.01306"""

    metrics = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl")

    def __init__(self, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> None:
        super().__init__()
        self.options = {
            "beta": beta,
            "desirable_weight": desirable_weight,
            "undesirable_weight": undesirable_weight,
        }

    @classmethod
    def of(cls, recipe: Recipe) -> Kto:
        section = recipe.preference
        beta = {} if section.beta is None else {"beta": section.beta}
        return cls(**beta, desirable_weight=section.desirable_weight, undesirable_weight=section.undesirable_weight)

    def collate(self, rows: LabelledRows, update: Sequence[int], how: Collating) -> list[LabelledBatch]:
        batches = []
        for group in cut(rows, update, token_budget=how.token_budget, packing=how.packing):
            others = [rows.mismatched[index] for index in group]
            mismatched = _answers(others, group, _known(rows.mismatched_reference, group), how)
            fields = _answers([rows.rows[index] for index in group], group, _known(rows.reference, group), how)
            desirable = torch.from_numpy(rows.desirable[group])
            batches.append(LabelledBatch(**fields, desirable=desirable, mismatched=AnswerBatch(**mismatched)))
        return batches

    def prepare(
        self, model: Any, batches: Sequence[LabelledBatch], total: Total = lambda tensor: tensor
    ) -> list[LabelledBatch]:
        device = next(model.parameters()).device
        sums, known = torch.zeros(2, device=device), []
        for batch in batches:
            known.append(self.of_reference(model, batch))
            other = batch.mismatched
            assert other is not None
            ratio = log_ratio(Answers(self.log_probs(model, other), other.tokens, self.of_reference(model, other)))
            sums += torch.stack([ratio.sum(), torch.tensor(float(len(ratio)), device=device)])
        ratio, count = total(sums)
        kl = kto_kl(ratio, count)
        return [replace(batch, reference=reference, kl=kl) for batch, reference in zip(batches, known)]

    def loss(self, model: Any, batch: LabelledBatch) -> Losses:
        assert batch.desirable is not None and batch.kl is not None
        answers = Answers(self.log_probs(model, batch), batch.tokens, batch.reference)
        values = kto(answers, batch.desirable, kl=batch.kl, **self.options)
        rewards, logps = self.options["beta"] * log_ratio(answers).detach(), answers.policy.detach()
        metrics = {"kl": batch.kl.expand(len(values))}
        for name, rows in (("chosen", batch.desirable), ("rejected", ~batch.desirable)):
            metrics |= {f"rewards/{name}": rewards[rows], f"logps/{name}": logps[rows]}
        return Losses(values, torch.tensor(batch.rows, device=values.device), metrics)


def settle_reference(setup: Setup, say: Say) -> None:
    """Compute beforehand what is to be, prove that the policy starts as its reference, and tell; before the training.

    Raises:
        TrainingStopped: the reference is not the policy that is trained.
        UsageError: another model that is to be the reference has other tokens.
    """
    objective, model = setup.objective, setup.model
    if not isinstance(objective, _OfAnswers) or not objective.needs_reference:
        return
    section = setup.recipe.preference
    if section.ref_model:
        other: Any = _other_model(setup, section.ref_model, say)
        asking: Any = type(objective).of(setup.recipe)
        with fused(other, lambda line: None):
            asking.begin(other, as_base=True)
            apart = setup.how.packing and keeps_rows_apart(other)
            sharing = apart and setup.how.sharing and shares_beginnings(other)
            _precompute(setup, other, asking, replace(setup.how, packing=apart, sharing=sharing), say)
        say(f"reference: {section.ref_model}")
        return
    if setup.trains_base or section.precompute_ref_log_probs:
        _precompute(setup, model, objective, setup.how, say)
    told = prove_start(model, objective, setup.data.train, setup.how, setup.autocast)
    say(f"reference: {objective.reference.told(model)}; {told}")


def _precompute(setup: Setup, model: Any, objective: _OfAnswers, how: Collating, say: Say) -> None:
    answers = {
        name: precompute(model, objective, rows, how, setup.autocast, say)
        for name, rows in (("train", setup.data.train), ("eval", setup.data.eval))
        if rows is not None
    }
    setup.data = replace(setup.data, **answers)


def _other_model(setup: Setup, name: str, say: Say) -> Any:
    """Another model as the reference, frozen."""
    loaded, tokenizer = load_model(
        resolve_model(name, say=say),
        **load_as(setup.recipe, setup.recipe.train.dtype, setup.model.device),
        device=setup.model.device,
        say=say,
    )
    if tokenizer.get_vocab() != setup.tokenizer.get_vocab():
        raise UsageError(f"preference.ref_model: {name} has other tokens than {setup.recipe.model}")
    return loaded.requires_grad_(False)
