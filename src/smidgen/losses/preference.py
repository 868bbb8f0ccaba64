"""Losses on preferences: functions of the log-probabilities of answers, one value for each pair or row.

Letters: B pairs or rows. In the formulas w is the chosen and l the rejected answer, p a probability under the policy, r
the log-ratio of policy to reference (`log_ratio`), s the logistic function. Nothing is averaged here: `losses.reduce`
says how. AOT alone joins several pairs, by sorting them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from smidgen.errors import UsageError, did_you_mean, raise_all
from smidgen.losses.answers import (
    DIVERGENCES,
    Answers,
    diverge,
    log_odds,
    log_prob,
    log_prob_per_token,
    log_ratio,
    per_token,
)
from smidgen.recipe import PreferenceRecipe


def _margin(chosen: Answers, rejected: Answers) -> Tensor:
    return log_ratio(chosen) - log_ratio(rejected)


def _logistic(reward_margin: Tensor, label_smoothing: float) -> Tensor:
    """-log s(margin), where a share `label_smoothing` of the pairs is held to be labelled the wrong way round."""
    return -(1 - label_smoothing) * logsigmoid(reward_margin) - label_smoothing * logsigmoid(-reward_margin)


def dpo(chosen: Answers, rejected: Answers, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """-log s(beta (r_w - r_l)); with label smoothing conservative DPO. https://arxiv.org/abs/2305.18290"""
    return _logistic(beta * _margin(chosen, rejected), label_smoothing)


def dpo_per_token(chosen: Answers, rejected: Answers, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO with the mean log-ratio of a token in place of r. https://arxiv.org/abs/2411.15124"""
    return dpo(per_token(chosen), per_token(rejected), beta=beta, label_smoothing=label_smoothing)


def ipo(chosen: Answers, rejected: Answers, *, beta: float = 0.1) -> Tensor:
    """(r_w/tokens_w - r_l/tokens_l - 1 / (2 beta))^2, as its authors normalise it. https://arxiv.org/abs/2310.12036"""
    return (_margin(per_token(chosen), per_token(rejected)) - 1 / (2 * beta)) ** 2


def hinge(chosen: Answers, rejected: Answers, *, beta: float = 0.1) -> Tensor:
    """max(0, 1 - beta (r_w - r_l)): SLiC's loss on RSO's log-ratios. https://arxiv.org/abs/2309.06657"""
    return torch.relu(1 - beta * _margin(chosen, rejected))


def robust(chosen: Answers, rejected: Answers, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """DPO without the bias of labels of which a share e is wrong. https://arxiv.org/abs/2403.00409

    (-(1 - e) log s(m) + e log s(-m)) / (1 - 2 e), with m = beta (r_w - r_l)
    """
    m = beta * _margin(chosen, rejected)
    return (label_smoothing * logsigmoid(-m) - (1 - label_smoothing) * logsigmoid(m)) / (1 - 2 * label_smoothing)


def exo(chosen: Answers, rejected: Answers, *, beta: float = 0.1, epsilon: float = 1e-3) -> Tensor:
    """Reverse KL from (s(m), s(-m)) to the labels (1 - epsilon, epsilon). https://arxiv.org/abs/2402.00856

    s(m) (log s(m) - log(1 - epsilon)) + s(-m) (log s(-m) - log epsilon), with m = beta (r_w - r_l)
    """
    m = beta * _margin(chosen, rejected)
    right = torch.sigmoid(m) * (logsigmoid(m) - math.log1p(-epsilon))
    return right + torch.sigmoid(-m) * (logsigmoid(-m) - math.log(epsilon))


def discopop(chosen: Answers, rejected: Answers, *, beta: float = 0.1, tau: float = 0.05) -> Tensor:
    """-(1 - g) log s(m) + g e^-m, with m = beta (r_w - r_l) and g = s(m / tau). https://arxiv.org/abs/2406.08414"""
    m = beta * _margin(chosen, rejected)
    gate = torch.sigmoid(m / tau)
    return gate * torch.exp(-m) - (1 - gate) * logsigmoid(m)


def nca(chosen: Answers, rejected: Answers, *, beta: float = 0.1) -> Tensor:
    """-log s(beta r_w) - log s(-beta r_w) / 2 - log s(-beta r_l) / 2. https://arxiv.org/abs/2402.05369"""
    w, l = beta * log_ratio(chosen), beta * log_ratio(rejected)  # noqa: E741
    return -logsigmoid(w) - 0.5 * logsigmoid(-w) - 0.5 * logsigmoid(-l)


def bco(chosen: Answers, rejected: Answers, *, beta: float = 0.1) -> Tensor:
    """-log s(beta r_w) - log s(-beta r_l), without BCO's shift of rewards. https://arxiv.org/abs/2404.04656"""
    return -logsigmoid(beta * log_ratio(chosen)) - logsigmoid(-beta * log_ratio(rejected))


def sppo(chosen: Answers, rejected: Answers, *, beta: float = 0.1) -> Tensor:
    """(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2: the chosen wins surely. https://arxiv.org/abs/2405.00675"""
    return (log_ratio(chosen) - 0.5 / beta) ** 2 + (log_ratio(rejected) + 0.5 / beta) ** 2


def apo_zero(chosen: Answers, rejected: Answers, *, beta: float = 0.1) -> Tensor:
    """s(-beta r_w) + s(beta r_l): up with the chosen, down with the rejected. https://arxiv.org/abs/2408.06266"""
    return torch.sigmoid(-beta * log_ratio(chosen)) + torch.sigmoid(beta * log_ratio(rejected))


def apo_down(chosen: Answers, rejected: Answers, *, beta: float = 0.1) -> Tensor:
    """s(beta r_w) + s(-beta (r_w - r_l)): both go down, the rejected further. https://arxiv.org/abs/2408.06266"""
    return torch.sigmoid(beta * log_ratio(chosen)) + torch.sigmoid(-beta * _margin(chosen, rejected))


def aot(chosen: Answers, rejected: Answers, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO between the sorted preferences of policy and reference, over all B pairs. https://arxiv.org/abs/2406.05882

    -log s(beta (p_(i) - q_(i))), with p = log policy_w - log policy_l and q the same of the reference, both sorted.
    """
    p = chosen.policy - rejected.policy
    q = p - _margin(chosen, rejected)
    return _logistic(beta * (p.sort().values - q.sort().values), label_smoothing)


def aot_unpaired(chosen: Answers, rejected: Answers, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO between the sorted log-ratios: -log s(beta (r_w(i) - r_l(i))). https://arxiv.org/abs/2406.05882"""
    margin = log_ratio(chosen).sort().values - log_ratio(rejected).sort().values
    return _logistic(beta * margin, label_smoothing)


def cpo(chosen: Answers, rejected: Answers, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """-log s(beta (log p_w - log p_l)): DPO under a uniform reference. https://arxiv.org/abs/2401.08417"""
    return _logistic(beta * (log_prob(chosen) - log_prob(rejected)), label_smoothing)


def simpo(
    chosen: Answers, rejected: Answers, *, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0
) -> Tensor:
    """-log s(beta (log p_w / tokens_w - log p_l / tokens_l) - gamma). https://arxiv.org/abs/2405.14734"""
    margin = log_prob_per_token(chosen) - log_prob_per_token(rejected)
    return _logistic(beta * margin - gamma, label_smoothing)


def orpo(chosen: Answers, rejected: Answers, *, beta: float = 0.1) -> Tensor:
    """-beta log s(log odds_w - log odds_l), to be added to SFT on the chosen. https://arxiv.org/abs/2403.07691"""
    return -beta * logsigmoid(log_odds(chosen) - log_odds(rejected))


def sft(chosen: Answers, rejected: Answers, *, mean_tokens: Tensor | float | None = None) -> Tensor:
    """-log p_w / `mean_tokens`, so that the mean over pairs is the mean over all tokens of chosen answers.

    mean_tokens: tokens of a chosen answer, mean over the update; None: these pairs are the whole update.
    """
    return -log_prob(chosen) / (chosen.tokens.to(chosen.policy.dtype).mean() if mean_tokens is None else mean_tokens)


def kto(
    answers: Answers,
    desirable: Tensor,
    *,
    kl: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """weight s(-+beta (r - kl)), minus where desirable, of rows that are not paired. https://arxiv.org/abs/2402.01306

    With kl = 0 it is APO-zero for such rows.

    Args:
        desirable: (B,) bool.
        kl: how far the policy is from the reference, over the whole update: `kto_kl`.

    Returns:
        (B,)
    """
    sign = torch.where(desirable, -1.0, 1.0)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return weight * torch.sigmoid(sign * beta * (log_ratio(answers) - kl))


def kto_kl(total: Tensor, count: Tensor | float) -> Tensor:
    """KTO's estimate of KL(policy, reference): the mean log-ratio of answers to other prompts than theirs, at least 0.

    Args:
        total: the sum of these log-ratios over the whole update. count: how many they are.
    """
    return (total.detach() / count).clamp(min=0)


@dataclass(frozen=True)
class Loss:
    """A row of the table.

    function: chosen and rejected `Answers` and keyword options to (B,) values.
    reward: what it raises for the chosen and lowers for the rejected; times beta, it is the implicit reward.
    of_margin: it depends on the difference of log-ratios alone, so that f-divergences have a meaning.
    sft: the weight of the SFT term that belongs to the method.
    """

    function: Callable[..., Tensor]
    summary: str
    reward: Callable[[Answers], Tensor] = log_ratio
    of_margin: bool = False
    sft: float = 0.0

    @property
    def needs_reference(self) -> bool:
        return self.reward is log_ratio

    @property
    def options(self) -> dict[str, float]:
        """Its options and their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {
            each.name: each.default
            for each in parameters
            if each.kind is each.KEYWORD_ONLY and each.default is not None
        }

    @property
    def paper(self) -> str:
        """Its address, as the function's docstring gives it."""
        words = (self.function.__doc__ or "").split()
        return next((word for word in words if word.startswith("https://")), "")


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(dpo, "DPO", of_margin=True),
    "sigmoid_norm": Loss(dpo_per_token, "DPO, normalised by length", of_margin=True),
    "ipo": Loss(ipo, "squared distance of the margin from a target", of_margin=True),
    "hinge": Loss(hinge, "a margin of 1 is enough", of_margin=True),
    "robust": Loss(robust, "DPO for labels of which a known share is wrong", of_margin=True),
    "exo_pair": Loss(exo, "reverse KL to the labels", of_margin=True),
    "discopop": Loss(discopop, "found by search: logistic and exponential", of_margin=True),
    "nca_pair": Loss(nca, "each reward on its own; holds the chosen's probability up"),
    "bco_pair": Loss(bco, "a classifier of good and bad answers"),
    "sppo_hard": Loss(sppo, "squared distance of each log-ratio from a win or a loss"),
    "apo_zero": Loss(apo_zero, "for chosen answers better than the model's own"),
    "apo_down": Loss(apo_down, "for chosen answers worse than the model's own"),
    "aot": Loss(aot, "optimal transport between sorted pairs"),
    "aot_unpaired": Loss(aot_unpaired, "optimal transport between sorted answers"),
    "cpo": Loss(cpo, "DPO without a reference, with SFT", log_prob, sft=1.0),
    "simpo": Loss(simpo, "mean log-probabilities and a margin, without a reference", log_prob_per_token),
    "orpo": Loss(orpo, "odds ratio without a reference, with SFT", log_odds, sft=1.0),
    "sft": Loss(sft, "cross-entropy of the chosen answer, to be mixed with others", log_prob),
}

_BOUNDS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "beta": ("above 0", lambda value: 0 < value < math.inf),
    "label_smoothing": ("at least 0 and below 0.5", lambda value: 0 <= value < 0.5),
    "epsilon": ("above 0 and below 0.5", lambda value: 0 < value < 0.5),
    "tau": ("above 0", lambda value: 0 < value < math.inf),
    "gamma": ("a finite number", math.isfinite),
}


def _problems(
    losses: Mapping[str, float], divergence: str, alpha: float, options: Mapping[str, float]
) -> Iterator[str]:
    if not any(losses.values()):
        yield f"loss: none has a weight above 0; there are: {', '.join(LOSSES)}"
    for name, weight in losses.items():
        if name not in LOSSES:
            yield f"loss: no '{name}'{did_you_mean(name, LOSSES)} There are: {', '.join(LOSSES)}"
        elif not 0 <= weight < math.inf:
            yield f"loss '{name}': its weight must be a number of at least 0, got {weight}"
    rows = {name: LOSSES[name] for name in losses if name in LOSSES}
    known = {key for row in rows.values() for key in row.options}
    for key, value in options.items():
        if key not in known:
            has = ", ".join(sorted(known)) or "none"
            yield f"loss {', '.join(losses)}: no option '{key}'{did_you_mean(key, known)} There are: {has}"
        elif not _BOUNDS[key][1](value):
            yield f"loss: {key} must be {_BOUNDS[key][0]}, got {value}"
    if divergence not in DIVERGENCES:
        near = did_you_mean(divergence, DIVERGENCES)
        yield f"divergence: no '{divergence}'{near} There are: {', '.join(DIVERGENCES)}"
    elif divergence != "reverse_kl" and (
        others := [name for name, row in rows.items() if not row.of_margin and name != "sft"]
    ):
        fitting = ", ".join(name for name, row in LOSSES.items() if row.of_margin)
        yield f"divergence: '{divergence}' has no meaning for {', '.join(others)}; it has for: {fitting}"
    if alpha != 1 and divergence != "alpha_divergence":
        yield f"alpha: {alpha} is of the alpha_divergence alone; the divergence is '{divergence}'"


class PreferenceLoss:
    """A weighted sum of losses of the table, checked before anything is spent.

    Args:
        losses: name -> weight. CPO and ORPO bring their SFT term, unless `sft` is named.
        divergence, alpha: see `diverge`.
        options: beta, label_smoothing...: each goes to all losses that have it.

    Raises:
        UsageError: unknown names, options that no loss has, values out of bounds: all at once.
    """

    def __init__(
        self, losses: Mapping[str, float], *, divergence: str = "reverse_kl", alpha: float = 1.0, **options: float
    ) -> None:
        raise_all(UsageError, list(_problems(losses, divergence, alpha, options)))
        rows = {name: LOSSES[name] for name, weight in losses.items() if weight}
        brought = max(row.sft for row in rows.values())
        self.weights = {name: weight for name, weight in {"sft": brought, **losses}.items() if weight}
        self.options = {
            name: {key: options[key] for key in options if key in row.options} for name, row in rows.items()
        }
        self.divergence, self.alpha = divergence, alpha
        self.needs_reference = any(row.needs_reference for row in rows.values())
        self._first = next(row for name, row in rows.items() if name != "sft" or len(rows) == 1)
        self._beta = options.get("beta", self._first.options.get("beta", 1.0))

    def __call__(self, chosen: Answers, rejected: Answers, *, mean_tokens: Tensor | float | None = None) -> Tensor:
        """The loss of each pair, (B,); `mean_tokens` as in `sft`."""
        pair = (chosen, rejected)
        if self.divergence != "reverse_kl":
            pair = (diverge(chosen, self.divergence, self.alpha), diverge(rejected, self.divergence, self.alpha))
        total = torch.zeros_like(chosen.policy)
        for name, weight in self.weights.items():
            if name == "sft":
                value = sft(chosen, rejected, mean_tokens=mean_tokens)
            else:
                value = LOSSES[name].function(*pair, **self.options[name])
            total = total + weight * value
        return total

    def rewards(self, answers: Answers) -> Tensor:
        """The implicit reward of each answer under the first loss named, (B,), without gradient."""
        return self._beta * self._first.reward(answers).detach()


def loss_of(recipe: PreferenceRecipe) -> PreferenceLoss:
    """The loss that a recipe asks for.

    Raises:
        UsageError: options do not fit; see `PreferenceLoss`.
    """
    weights = recipe.loss_weights or [1.0] * len(recipe.loss_type)
    losses = dict(zip(recipe.loss_type, weights))
    if recipe.rpo_alpha:
        losses["sft"] = recipe.rpo_alpha
    named = {"tau": recipe.discopop_tau, "gamma": recipe.simpo_gamma}
    named |= {name: getattr(recipe, name) for name in ("beta", "label_smoothing", "epsilon")}
    options = {name: value for name, value in named.items() if value is not None}
    return PreferenceLoss(losses, divergence=recipe.f_divergence_type, alpha=recipe.f_alpha_divergence_coef, **options)


def problems_of(recipe: PreferenceRecipe) -> list[str]:
    """What is wrong with the preference part of a recipe whose objective is dpo, a line each."""
    names, weights = recipe.loss_type, recipe.loss_weights
    problems = []
    if len(set(names)) < len(names):
        problems.append("loss_type: a loss is named twice")
    if weights is not None and len(weights) != len(names):
        problems.append(f"loss_weights: {len(weights)} weights for {len(names)} losses")
    if recipe.rpo_alpha is not None and "sft" in names:
        problems.append("rpo_alpha: 'sft' is among the losses already; keep one of the two")
    if problems:
        return problems
    try:
        loss = loss_of(recipe)
    except UsageError as error:
        return str(error).splitlines()
    if not loss.needs_reference:
        for name in ("ref_model", "precompute_ref_log_probs"):
            if getattr(recipe, name):
                problems.append(f"{name}: {', '.join(names)} needs no reference; remove it")
    return problems


def reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """What is watched of the rewards (B,) of pairs: values (B,) under the names of their means.

    A pair counts as right when the chosen answer's reward is the higher one; equal rewards are wrong.
    """
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
    }
