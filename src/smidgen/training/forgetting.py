"""What holds a training to what the model could before, whatever its objective; and whether it held.

Beside an update's own rows some general text may be computed: it is learned (replay), or the policy is held to the
base on it (KL). The trained parameters may be held to their start, each by how much general text depends on it (EWC),
or all alike (L2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smidgen.data.packing import Batch
from smidgen.data.prepare import prepare_data
from smidgen.data.rows import TokenRows
from smidgen.errors import DataError
from smidgen.losses.forgetting import distance, token_kl
from smidgen.losses.lm import token_cross_entropy
from smidgen.models.resolve import cache_folder
from smidgen.models.scores import learned, learned_rows, logits_at, losses_at
from smidgen.proofs import Check
from smidgen.recipe import DataRecipe, GeneralRecipe, Recipe
from smidgen.training.objectives import Collating, Losses, Objective
from smidgen.training.optimizers.states import trainable
from smidgen.training.reference import evaluating, fixed_batches

KL_SHARE = 0.1  # of the tokens of an update, where nothing is replayed
KL_TOKENS = 256  # computed at once: all logits of both models are there
FISHER_ROWS = 64
DRAWS = 2000  # of the bootstrap
SLIGHT = 0.01  # nats a token, one percent more perplexity: what is below is kept


@dataclass(frozen=True)
class General:
    """General rows: those that the controls may use, and those on which it is measured what was forgotten."""

    train: TokenRows
    eval: TokenRows


def read_general(recipe: Recipe, tokenizer: Any, stop_ids: set[int], say: Callable[[str], None]) -> General | None:
    """The rows of the recipe's general data, every token of which counts; None: it names none.

    Raises:
        DataError: files or rows are wrong, or too few.
    """
    section, data = recipe.general, recipe.data
    if section.data is None:
        return None
    asked = DataRecipe(
        train=section.data,
        eval_size=section.eval_size,
        max_length=data.max_length,
        template=data.template,
        on_long=data.on_long,
    )
    options = {"seed": recipe.seed, "cache_dir": cache_folder() / "tokens", "stop_ids": stop_ids, "progress": say}
    try:
        found = prepare_data(asked, tokenizer, objective="pretrain", **options)
    except DataError as error:
        raise DataError(f"general.data: {error}") from None
    for line in ("what is to be kept:", *found.report.lines()):
        say(line)
    assert found.eval is not None
    kept = [rows.select(np.flatnonzero(rows.supervised_counts)) for rows in (found.train, found.eval)]
    if not all(map(len, kept)):
        raise DataError("general.data: no row of two tokens or more is left to learn from, or to measure on")
    return General(*kept)


class Controls(Objective):
    """The controls of one run; as an objective, what general text adds to an update.

    Args:
        model: as it starts; its trained parameters are kept where they are to be held.
        rows: general rows; None: none of the controls needs them.
        autocast: the dtype of the arithmetic where the trained parameters are kept in a wider one.
    """

    def __init__(
        self,
        recipe: GeneralRecipe,
        model: Any,
        rows: TokenRows | None,
        how: Collating,
        seed: int,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.recipe, self.rows, self.seed = recipe, rows, seed
        self.metrics = (*["general/loss"] * bool(recipe.share), *["general/kl"] * bool(recipe.kl))
        if rows is not None:
            longest = int(rows.lengths.max())
            budget = min(how.token_budget, KL_TOKENS) if recipe.kl else how.token_budget
            self.how = replace(how, token_budget=max(budget, longest))
        self.parameters = [*trainable(model).values()] if recipe.ewc or recipe.l2 else []
        self.start = [parameter.detach().clone() for parameter in self.parameters]
        if recipe.ewc:
            assert rows is not None
            sample = rows.select(np.random.default_rng(seed).permutation(len(rows))[:FISHER_ROWS])
            self.sampled = len(sample)
            self.fisher = fisher_diagonal(model, self.parameters, sample, self.how, autocast)

    def told(self) -> str:
        """What is on, in words; an empty text where nothing is."""
        recipe, told = self.recipe, []
        if recipe.share:
            told.append(f"replay {recipe.share:.1%} of the tokens")
        if recipe.kl:
            told.append(f"KL {recipe.kl:g} on {recipe.share or KL_SHARE:.1%} of the tokens")
        if recipe.ewc:
            told.append(f"EWC {recipe.ewc:g} by the Fisher information of {self.sampled} general rows")
        if recipe.l2:
            told.append(f"L2 {recipe.l2:g}")
        return ", ".join(told)

    def draw(self, step: int, tokens: int) -> TokenRows | None:
        """The general rows of an update whose own rows have so many tokens; None: it has none.

        They follow from the seed and the step alone. The last row is cut where the share is full.
        """
        if not self.metrics:
            return None
        assert self.rows is not None
        share = self.recipe.share or KL_SHARE
        wanted = max(2, round(tokens * share / (1 - share)))
        random = np.random.default_rng([self.seed, step])
        passes = -(-wanted // int(self.rows.lengths.sum()))
        order = np.concatenate([random.permutation(len(self.rows)) for _ in range(passes)])
        return self.rows.select(order).first(wanted)

    def loss(self, model: Any, batch: Batch) -> Losses:
        """Of each token its cross-entropy, by the share, and its KL, by `kl`.

        Beside the mean of the objective's values the mean of these is added. A share s weighs s / (1 - s): where the
        objective learns tokens too, all tokens of the update then weigh alike.
        """
        recipe, rows = self.recipe, learned_rows(batch)
        weight = recipe.share / (1 - recipe.share)
        if not recipe.kl:
            values = losses_at(model, batch)
            return Losses(weight * values, rows, {"general/loss": values.detach()})
        with torch.no_grad(), evaluating(model), model.disable_adapter():
            base = logits_at(model, batch)
        logits = logits_at(model, batch)
        kl = token_kl(base, logits)
        metrics = {"general/kl": kl.detach()}
        values = recipe.kl * kl
        if weight:
            losses = token_cross_entropy(logits, learned(batch).targets)
            values, metrics["general/loss"] = values + weight * losses, losses.detach()
        return Losses(values, rows, metrics)

    def penalties(self) -> list[Tensor]:
        """Terms for the loss of an update, once, however it is cut."""
        found = []
        if self.recipe.ewc:
            found.append(self.recipe.ewc * distance(self.parameters, self.start, self.fisher))
        if self.recipe.l2:
            found.append(self.recipe.l2 * distance(self.parameters, self.start))
        return found


def fisher_diagonal(
    model: nn.Module, parameters: list[nn.Parameter], rows: TokenRows, how: Collating, autocast: torch.dtype | None
) -> list[Tensor]:
    """The diagonal of the empirical Fisher information, per token: of each parameter the mean squared gradient.

    The gradient is that of a whole row's log-probability; its squares are added up over the rows and divided by all
    tokens. Dropout does not act.

    Returns:
        Tensors like the parameters, float32 or wider.
    """
    wide = [torch.promote_types(parameter.dtype, torch.float32) for parameter in parameters]
    found = [torch.zeros_like(parameter, dtype=dtype) for parameter, dtype in zip(parameters, wide, strict=True)]
    device, objective = parameters[0].device, Objective()
    with evaluating(model), torch.autocast(device.type, autocast, enabled=autocast is not None):
        for index in range(len(rows)):
            (batch,) = objective.collate(rows, [index], how)
            total = objective.loss(model, batch.to(device)).values.sum()
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
            for sums, gradient in zip(found, gradients, strict=True):
                if gradient is not None:
                    sums += gradient.to(sums.dtype).square()
    return [sums / int(rows.supervised_counts.sum()) for sums in found]


# ---- was it kept? ----


@torch.no_grad()
def row_sums(model: Any, rows: TokenRows, how: Collating, autocast: torch.dtype | None) -> np.ndarray:
    """(rows,) float64: the loss of each row, summed over its tokens."""
    sums, objective = np.zeros(len(rows)), Objective()
    with evaluating(model), torch.autocast(model.device.type, autocast, enabled=autocast is not None):
        for batch in fixed_batches(objective, rows, how):
            values, indices, _ = objective.loss(model, batch.to(model.device))
            np.add.at(sums, indices.cpu().numpy(), values.double().cpu().numpy())
    return sums


def check_kept(rows: TokenRows, before: np.ndarray, after: np.ndarray) -> Check:
    """The loss of general text did not grow; of each row its loss before and after, summed over its tokens."""
    counts = rows.supervised_counts
    start, end = before.sum() / counts.sum(), after.sum() / counts.sum()
    low, high = paired_bootstrap(after - before, counts)
    verdict = "forgot" if low > SLIGHT else "kept" if high < SLIGHT else "unclear, more general rows would tell"
    text = (
        f"general text: loss per token on {len(rows):,} held-out rows {start:.4f} -> {end:.4f}, {end - start:+.4f} "
        f"(95 % interval {low:+.4f} to {high:+.4f}): {verdict}"
    )
    numbers = {"before": start, "after": end, "difference": end - start, "low": low, "high": high}
    return Check("general", verdict != "forgot", text, numbers)


def paired_bootstrap(change: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean change per token: its percentiles over rows drawn with replacement.

    Args:
        change: (rows,) by how much the sum over a row's tokens changed. counts: (rows,) its tokens.
    """
    random, rows = np.random.default_rng(0), len(change)
    drawn = (random.integers(rows, size=rows) for _ in range(DRAWS))
    means = [change[chosen].sum() / counts[chosen].sum() for chosen in drawn]
    low, high = np.percentile(means, [2.5, 97.5]).tolist()
    return low, high
