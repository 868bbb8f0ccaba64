"""Losses on preferences: equal to TRL's, value and gradient, and to closed forms in float64."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from smidgen.errors import UsageError
from smidgen.losses.answers import DIVERGENCES, Answers, per_token, sum_tokens
from smidgen.losses.preference import LOSSES, PreferenceLoss, kto, kto_kl, reward_metrics

B, T = 6, 9
SHARP = {"beta": 0.3, "label_smoothing": 0.2, "epsilon": 0.01, "tau": 0.5, "gamma": 0.7}
IN_DPO = [name for name in LOSSES if name not in ("cpo", "simpo", "orpo")]


class Batch:
    """Random token log-probabilities of B pairs: of the policy with a gradient, and of the reference."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        draw = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(1, T, (2 * B,), generator=draw)  # the chosen, then the rejected
        self.mask = torch.arange(T) < self.tokens[:, None]
        self.policy = (-2 * torch.rand(2 * B, T, generator=draw, dtype=dtype) * self.mask).requires_grad_()
        self.reference = -2 * torch.rand(2 * B, T, generator=draw, dtype=dtype) * self.mask

    def pair(self, ld_alpha: float = 1.0) -> tuple[Answers, Answers]:
        other = self.tokens.roll(B)
        policy, reference = (
            sum_tokens(logps[self.mask], self.tokens, other, ld_alpha=ld_alpha)
            for logps in (self.policy, self.reference)
        )
        chosen, rejected = (Answers(policy[s], self.tokens[s], reference[s]) for s in (slice(0, B), slice(B, None)))
        return chosen, rejected

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        (found,) = torch.autograd.grad(loss, self.policy)
        return found * self.mask


def same(batch: Batch, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(batch.gradient(ours), batch.gradient(theirs), rtol=1e-6, atol=1e-6)


def stub(**settings: object) -> SimpleNamespace:
    """What TRL's loss functions read of a trainer."""
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    return SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=accelerator,
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        use_weighting=False,
        label_smoothing=SHARP["label_smoothing"],
        beta=SHARP["beta"],
        _metrics=metrics,
        _total_train_tokens=0,
        **settings,
    )


def trl_dpo(batch: Batch, losses: dict[str, float], divergence="reverse_kl", alpha=1.0, ld_alpha=None, **options):
    DPOTrainer = pytest.importorskip("trl").DPOTrainer

    trainer = stub(
        args=SimpleNamespace(discopop_tau=SHARP["tau"]),
        loss_types=list(losses),
        loss_weights=list(losses.values()),
        ld_alpha=ld_alpha,
        f_divergence_type=divergence,
        f_alpha_divergence_coef=alpha,
    )
    trainer.__dict__.update(options)
    ref_chosen, ref_rejected = (answers.reference for answers in batch.pair(1.0 if ld_alpha is None else ld_alpha))
    inputs = {
        "input_ids": torch.zeros(2 * B, T + 1, dtype=torch.long),
        "completion_mask": torch.cat([torch.zeros(2 * B, 1), batch.mask], dim=1).long(),
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    zeros = torch.zeros(2 * B, T)
    outputs = SimpleNamespace(log_probs=batch.policy, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    loss = DPOTrainer._compute_loss(trainer, lambda **inputs: outputs, inputs, False)
    return loss, trainer._metrics["eval"]


def ours(batch: Batch, losses: dict[str, float], ld_alpha: float = 1.0, **settings):
    options = {key: value for key, value in SHARP.items() if any(key in LOSSES[name].options for name in losses)}
    if losses.keys() & {"sigmoid", "sigmoid_norm"}:  # which TRL does not smooth
        del options["label_smoothing"]
    loss = PreferenceLoss(losses, **{**options, **settings})
    return loss, loss(*batch.pair(ld_alpha)).mean()


@pytest.mark.parametrize("name", IN_DPO)
def test_a_loss_and_its_gradient_are_trls(name):
    batch = Batch()
    options = {"label_smoothing": SHARP["epsilon"]} if name == "exo_pair" else {}
    theirs, watched = trl_dpo(batch, {name: 1.0}, **options)
    loss, value = ours(batch, {name: 1.0})
    same(batch, value, theirs)
    if name == "sft":
        return
    rewards = reward_metrics(*map(loss.rewards, batch.pair()))
    for key, values in rewards.items():
        assert values.shape == (B,)
        assert values.mean().item() == pytest.approx(watched[key][0], abs=1e-6)


@pytest.mark.parametrize(
    ("divergence", "alpha"),
    [*((name, 1.0) for name in DIVERGENCES), ("alpha_divergence", 0.5), ("alpha_divergence", 0.0)],
)
@pytest.mark.parametrize("name", [name for name, row in LOSSES.items() if row.of_margin])
def test_divergences_are_trls(name, divergence, alpha):
    batch = Batch(torch.float32)  # the widest that TRL's alpha-divergence takes
    options = {"label_smoothing": SHARP["epsilon"]} if name == "exo_pair" else {}
    theirs, _ = trl_dpo(batch, {name: 1.0}, divergence, alpha, **options)
    _, value = ours(batch, {name: 1.0}, divergence=divergence, alpha=alpha)
    torch.testing.assert_close(value, theirs, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(batch.gradient(value), batch.gradient(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
def test_length_desensitised_log_probabilities_are_trls(ld_alpha):
    batch = Batch()
    same(batch, ours(batch, {"sigmoid": 1.0}, ld_alpha)[1], trl_dpo(batch, {"sigmoid": 1.0}, ld_alpha=ld_alpha)[0])


def test_weighted_losses_are_trls():
    batch, losses = Batch(), {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.5}
    same(batch, ours(batch, losses)[1], trl_dpo(batch, losses)[0])


@pytest.mark.parametrize("name", ["cpo", "simpo"])
def test_losses_without_reference_are_trls(name):
    CPOTrainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer

    batch = Batch()
    kind = {"cpo": "sigmoid", "simpo": "simpo"}[name]
    trainer = stub(alpha=0.0, loss_type=kind, simpo_gamma=SHARP["gamma"])
    chosen, rejected = map(per_token if name == "simpo" else tuple, batch.pair())
    theirs, reward, _ = CPOTrainer.cpo_loss(trainer, chosen[0], rejected[0])
    loss, value = ours(batch, {name: 1.0, "sft": 0.0})
    same(batch, value, theirs.mean())
    torch.testing.assert_close(loss.rewards(batch.pair()[0]), reward)


def test_orpo_is_trls():
    ORPOTrainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer

    batch = Batch()
    chosen, rejected = map(per_token, batch.pair())
    theirs = ORPOTrainer.odds_ratio_loss(stub(), chosen.policy, rejected.policy)[0]
    value = ours(batch, {"orpo": 1.0, "sft": 0.0})[1]
    torch.testing.assert_close(value.float(), -theirs.mean(), rtol=1e-6, atol=1e-6)  # theirs is in float32
    torch.testing.assert_close(batch.gradient(value), batch.gradient(-theirs.mean()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_kto_is_trls(kind):
    KTOTrainer = pytest.importorskip("trl").KTOTrainer

    batch = Batch()
    chosen, rejected = batch.pair()
    answers = Answers(*(torch.cat(both) for both in zip(chosen, rejected)))
    label = torch.arange(2 * B) % 3 == 0
    kl_logps = torch.linspace(-3, 9, 2 * B, dtype=torch.float64)
    inputs = {
        "input_ids": torch.zeros(2 * B, T + 1, dtype=torch.long),
        "completion_mask": torch.cat([torch.zeros(2 * B, 1), batch.mask], dim=1).long(),
        "label": label,
        "ref_logps": answers.reference,
        "ref_KL_logps": torch.zeros_like(kl_logps),
    }
    zeros = torch.zeros(2 * B, T)
    outputs = SimpleNamespace(log_probs=batch.policy, entropy=zeros, mean_logits=zeros)
    trainer = stub(
        calculate_KL=kind == "kto",
        loss_type=kind,
        desirable_weight=1.3,
        undesirable_weight=0.6,
        _compute_kl_logps=lambda model, inputs: kl_logps,
    )
    theirs = KTOTrainer._compute_loss(trainer, lambda **inputs: outputs, inputs, False)
    kl = kto_kl(kl_logps.detach().sum(), len(kl_logps)) if kind == "kto" else 0.0
    assert kind != "kto" or kl.item() == pytest.approx(3.0)
    value = kto(answers, label, kl=kl, beta=SHARP["beta"], desirable_weight=1.3, undesirable_weight=0.6)
    assert value.shape == (2 * B,)
    same(batch, value.mean(), theirs)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "cpo", "aot"])
def test_smoothing_takes_a_share_of_the_pairs_the_wrong_way_round(name):
    chosen, rejected = (Answers(*(part[:1] for part in side)) for side in Batch().pair())  # one pair: nothing to sort
    plain, smooth = (PreferenceLoss({name: 1.0, "sft": 0.0}, label_smoothing=share) for share in (0.0, 0.2))
    mixed = 0.8 * plain(chosen, rejected) + 0.2 * plain(rejected, chosen)
    torch.testing.assert_close(smooth(chosen, rejected), mixed)


def test_ktos_divergence_is_not_below_zero_and_has_no_gradient():
    policy = torch.tensor([-4.0, -2.0], requires_grad=True)
    found = kto_kl(policy.sum(), len(policy))
    assert found.item() == 0 and not found.requires_grad


def test_every_loss_is_known_at_the_start():
    """Policy and reference are equal: each loss is the closed form of a log-ratio of 0."""
    equal = torch.tensor([-3.0, -5.0], dtype=torch.float64)
    answers = Answers(equal, torch.tensor([2, 4]), equal)
    half, e = math.log(2), 1e-3
    expected = {
        "sigmoid": half,
        "sigmoid_norm": half,
        "ipo": 25.0,
        "hinge": 1.0,
        "robust": half,
        "exo_pair": -half - (math.log1p(-e) + math.log(e)) / 2,
        "discopop": (half + 1) / 2,
        "nca_pair": 2 * half,
        "bco_pair": 2 * half,
        "sppo_hard": 50.0,
        "apo_zero": 1.0,
        "apo_down": 1.0,
        "aot": half,
        "aot_unpaired": half,
        "cpo": half + 8 / 6,  # and the SFT term: 8 nats over 6 tokens
        "simpo": math.log1p(math.e),
        "orpo": 0.1 * half + 8 / 6,
        "sft": 8 / 6,
    }
    assert expected.keys() == LOSSES.keys()
    for name, value in expected.items():
        loss = PreferenceLoss({name: 1.0})
        assert loss(answers, answers).mean().item() == pytest.approx(value, abs=1e-9), name
        if loss.needs_reference:
            assert reward_metrics(loss.rewards(answers), loss.rewards(answers))["rewards/margins"].abs().max() == 0


def test_the_sft_term_of_a_piece_is_its_share_of_the_updates_mean():
    chosen, rejected = Batch().pair()
    loss = PreferenceLoss({"sft": 1.0})
    mean_tokens = chosen.tokens.double().mean().item()
    pieces = [
        loss(*(Answers(*(part[at] for part in side)) for side in (chosen, rejected)), mean_tokens=mean_tokens)
        for at in (slice(0, 2), slice(2, B))
    ]
    torch.testing.assert_close(torch.cat(pieces), loss(chosen, rejected))
    torch.testing.assert_close(torch.cat(pieces).mean(), -chosen.policy.sum() / chosen.tokens.sum())


def test_odds_of_a_certain_answer_are_finite():
    policy = torch.tensor([0.0, -1e-9, -200.0], requires_grad=True)
    certain = Answers(policy, torch.tensor([1, 1, 1]))
    loss = PreferenceLoss({"orpo": 1.0})(certain, Answers(policy.detach(), certain.tokens)).sum()
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(policy.grad).all()


def test_every_row_has_a_paper_and_bounds_for_its_options():
    for name, row in LOSSES.items():
        assert row.paper.startswith("https://arxiv.org/abs/") or name == "sft"
        for key, default in row.options.items():
            assert PreferenceLoss({name: 1.0}, **{key: default})
    assert {name for name, row in LOSSES.items() if not row.needs_reference} == {"cpo", "simpo", "orpo", "sft"}


@pytest.mark.parametrize(
    ("losses", "settings", "words"),
    [
        ({"sigmoyd": 1.0}, {}, "no 'sigmoyd'; did you mean 'sigmoid'"),
        ({"sigmoid": -1.0}, {}, "'sigmoid': its weight must be a number of at least 0, got -1"),
        ({}, {}, "none has a weight above 0"),
        ({"ipo": 1.0}, {"label_smoothing": 0.1}, "loss ipo: no option 'label_smoothing' There are: beta"),
        ({"sft": 1.0}, {"mean_tokens": 1.0}, "loss sft: no option 'mean_tokens' There are: none"),
        ({"robust": 1.0}, {"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5, got 0.5"),
        ({"sigmoid": 1.0}, {"beta": math.nan}, "beta must be above 0, got nan"),
        ({"sigmoid": 1.0}, {"divergence": "js"}, "no 'js'"),
        ({"nca_pair": 1.0, "sft": 1.0}, {"divergence": "forward_kl"}, "has no meaning for nca_pair; it has for: sigm"),
        ({"sigmoid": 1.0}, {"alpha": 0.5}, "alpha: 0.5 is of the alpha_divergence alone"),
    ],
)
def test_mistakes_are_told_before_anything_is_computed(losses, settings, words):
    with pytest.raises(UsageError, match=words):
        PreferenceLoss(losses, **settings)


def test_a_loss_that_needs_a_reference_says_that_there_is_none():
    answers = Answers(torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="no reference log-probabilities"):
        PreferenceLoss({"sigmoid": 1.0})(answers, answers)
