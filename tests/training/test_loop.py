"""The loop: what must not change the gradient, resuming, guards, interruption."""

from __future__ import annotations

import math
import signal
from typing import Any

import pytest
import torch

from smidgen.adapters.methods.lora import Lora
from smidgen.errors import DataError, TrainingStopped, UsageError
from smidgen.training import checkpoint
from smidgen.training.guards import GradientGuard, Interrupted
from smidgen.training.loop import evaluate, read_log
from smidgen.training.objectives import Objective
from tests.conftest import tiny_llama
from tests.training.conftest import make_loop, make_rows, tiny_lora

UNEQUAL = make_rows([5, 12, 7, 3, 9, 16, 4, 11, 6, 8], prompt=2)


def gradients(
    folder, model, budget: int, packing: bool = False, update=None, rows: Any = UNEQUAL, objective=None
) -> dict[str, torch.Tensor]:
    """The gradients of one update, before the optimizer moves anything."""
    options = {"budget": budget, "packing": packing, "objective": objective}
    loop = make_loop(model, rows, folder, max_grad_norm=1e9, **options)
    found: dict[str, torch.Tensor] = {}
    loop.optimizer.register_step_pre_hook(
        lambda *_: found.update({name: p.grad.clone() for name, p in loop.parameters.items() if p.grad is not None})
    )
    with loop_running(loop):
        loop._update(update or list(range(8)))
    return found


def loop_running(loop):
    """What `fit` sets up around its updates."""
    from smidgen.training.progress import Progress

    loop.progress = Progress(loop.total, 0, loop.device)
    loop.model.train()
    return loop.progress


class Signalling(Objective):
    """Presses Ctrl-C in the micro-batch of the given number."""

    def __init__(self, at: int):
        self.left = at

    def loss(self, model, batch):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return super().loss(model, batch)


class Spoiling(Objective):
    """Makes the loss of some rows infinite."""

    def __init__(self, *rows: int):
        self.rows = rows

    def loss(self, model, batch):
        found = super().loss(model, batch)
        bad = torch.isin(found.rows, torch.tensor(self.rows))
        return found._replace(values=found.values * torch.where(bad, torch.inf, 1.0))


# ---- what must not change the gradient ----


@pytest.mark.parametrize("update", [list(range(8)), [8, 9, 0]], ids=["full", "partial"])
@pytest.mark.parametrize(("budget", "packing"), [(16, False), (32, False), (32, True), (512, True)])
def test_gradients_do_not_depend_on_the_cut_into_micro_batches(tmp_path, budget, packing, update):
    whole = gradients(tmp_path / "a", tiny_llama(), 512, update=update)
    cut = gradients(tmp_path / "b", tiny_llama(), budget, packing, update)
    assert whole.keys() == cut.keys()
    for name, grad in whole.items():
        torch.testing.assert_close(cut[name], grad, atol=1e-6, rtol=1e-5, msg=name)


def test_the_loss_of_an_update_is_the_mean_over_its_supervised_tokens(tmp_path):
    found = gradients(tmp_path, tiny_llama(), 16)
    model = tiny_llama()
    losses = []
    for row in list(UNEQUAL)[:8]:
        ids = torch.tensor(row.input_ids).long()[None]
        labels = ids.masked_fill(~torch.tensor(row.supervised)[None], -100)
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        losses.append(torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum"))
    (sum(losses) / UNEQUAL.supervised_counts[:8].sum()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-5, msg=name)


def test_gradient_checkpointing_changes_nothing_and_needs_no_call(tmp_path):
    plain = gradients(tmp_path / "a", tiny_lora(), 64)
    model = tiny_lora()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    saved = gradients(tmp_path / "b", model, 64)
    assert len(plain) == 28
    for name, grad in plain.items():
        torch.testing.assert_close(saved[name], grad, atol=1e-6, rtol=1e-6, msg=name)


def test_the_first_update_holds_the_longest_row(tmp_path):
    loop = make_loop(tiny_lora(), UNEQUAL, tmp_path)
    assert 5 in loop._rows_of(0)


# ---- resuming ----


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("make", [lambda: tiny_lora(dropout=0.05), tiny_llama], ids=["lora", "full"])
def test_a_resumed_run_is_bit_identical(tmp_path, make, packing):
    options = {"max_steps": 40, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "packing": packing, "budget": 24}
    straight = make_loop(make(), UNEQUAL, tmp_path / "straight", logging_steps=3, **options)
    straight.fit()

    stopping = Signalling(at=10 * 4)  # in the tenth update or somewhat before: micro-batches differ in number
    first = make_loop(
        make(), UNEQUAL, tmp_path / "resumed", logging_steps=3, save_steps=5, objective=stopping, **options
    )
    with pytest.raises(Interrupted, match="--resume"):
        first.fit()
    assert 5 < first.step < 40
    torch.manual_seed(99)  # what is restored must not depend on what was there
    second = make_loop(make(), UNEQUAL, tmp_path / "resumed", logging_steps=3, save_steps=5, **options)
    found = checkpoint.latest(tmp_path / "resumed" / "checkpoints")
    assert found and found.step == first.step
    second.resume(found)
    second.fit()

    keys = ("step", "loss", "lr", "grad_norm")
    logs = [[[line[key] for key in keys] for line in read_log(tmp_path / name)] for name in ("straight", "resumed")]
    assert logs[0] == logs[1]
    assert logs[0][-1][0] == 40
    for name, parameter in straight.parameters.items():
        assert torch.equal(parameter, second.parameters[name]), name


class Crashing(Objective):
    """Dies, as a process does that is killed, in the micro-batch of the given number."""

    def __init__(self, at: int):
        self.left = at

    def loss(self, model, batch):
        self.left -= 1
        if self.left == 0:
            raise MemoryError
        return super().loss(model, batch)


def test_a_run_that_died_goes_on_from_its_last_checkpoint(tmp_path):
    options = {"max_steps": 20, "logging_steps": 2, "budget": 512, "packing": True}  # one micro-batch in an update
    straight = make_loop(tiny_lora(dropout=0.05), UNEQUAL, tmp_path / "straight", **options)
    straight.fit()
    dying = make_loop(
        tiny_lora(dropout=0.05), UNEQUAL, tmp_path / "died", save_steps=5, objective=Crashing(at=14), **options
    )
    with pytest.raises(MemoryError):
        dying.fit()
    assert read_log(tmp_path / "died")[-1]["step"] == 12
    found = checkpoint.latest(tmp_path / "died" / "checkpoints")
    assert found and found.step == 10
    second = make_loop(tiny_lora(dropout=0.05, seed=9), UNEQUAL, tmp_path / "died", **options)
    second.resume(found)
    second.fit()
    logs = [[(line["step"], line["loss"]) for line in read_log(tmp_path / name)] for name in ("straight", "died")]
    assert logs[0] == logs[1] and len(logs[0]) == 10
    assert all(torch.equal(p, second.parameters[name]) for name, p in straight.parameters.items())


def test_a_checkpoint_of_another_rank_is_refused(tmp_path):
    first = make_loop(tiny_lora(), UNEQUAL, tmp_path)
    first.save()
    found = checkpoint.latest(tmp_path / "checkpoints")
    assert found
    with pytest.raises(UsageError, match=r"only in the checkpoint: .*lora_A"):
        make_loop(tiny_llama(), UNEQUAL, tmp_path).resume(found)


# ---- guards ----


def test_a_layer_frozen_by_mistake_is_named(tmp_path):
    model = tiny_lora()
    learners = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in learners.items():
        if "layers.1.self_attn.q_proj" in name:
            parameter.requires_grad_(False)
    loop = make_loop(model, UNEQUAL, tmp_path)
    loop.guard = GradientGuard(learners)
    with pytest.raises(
        TrainingStopped, match=r"2 of 28 trainable tensors got no gradient: .*layers\.1.*q_proj.*lora_A"
    ):
        loop.fit()


def test_a_tensor_whose_gradient_stays_zero_is_named_after_the_second_update(tmp_path):
    model = tiny_lora()
    silent = [p for name, p in model.named_parameters() if "layers.0.mlp.up_proj" in name and "lora_B" in name]
    silent[0].register_hook(torch.zeros_like)
    loop = make_loop(model, UNEQUAL, tmp_path)
    with pytest.raises(TrainingStopped, match=r"2 of 28 .* zeros twice: .*up_proj.*lora_A.*up_proj.*lora_B"):
        loop.fit()
    assert loop.step == 1


def test_loras_zero_gradient_at_the_start_is_no_mistake(tmp_path):
    loop = make_loop(tiny_lora(), UNEQUAL, tmp_path, max_steps=3)
    loop.fit()
    assert loop.step == 3


def test_nothing_trainable_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="0 trainable parameters"):
        make_loop(tiny_llama().requires_grad_(False), UNEQUAL, tmp_path)


def test_nothing_supervised_is_an_error(tmp_path):
    with pytest.raises(DataError, match="0 supervised tokens in 2 rows"):
        make_loop(tiny_lora(), make_rows([4, 4], prompt=4), tmp_path)


def test_a_bad_update_is_skipped_and_its_row_named(tmp_path, capsys):
    loop = make_loop(tiny_lora(), UNEQUAL, tmp_path, max_steps=6, objective=Spoiling(3))
    loop.fit()
    told = " ".join(capsys.readouterr().out.split())
    assert "non-finite loss (first: the loss); rows rows.jsonl:4; skipped (1/3)" in told
    assert all(parameter.isfinite().all() for parameter in loop.parameters.values())


def test_three_bad_updates_stop_the_run_and_the_last_good_weights_are_kept(tmp_path):
    loop = make_loop(tiny_lora(), UNEQUAL, tmp_path, max_steps=9, objective=Spoiling(4, 5, 6))
    loop._plan = lambda epoch: [[0, 1], [2, 3], [4], [5], [6, 7]]
    loop.updates_per_epoch = 5
    with pytest.raises(TrainingStopped) as stopped:
        loop.fit()
    assert stopped.value.exit_code == 3
    assert "last good checkpoint: " in str(stopped.value) and "rows rows.jsonl:7; skipped (3/3)" in str(stopped.value)
    found = checkpoint.latest(tmp_path / "checkpoints")
    assert found and found.step == 2


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_first_bad_module_is_named(tmp_path, capsys, where):
    model = tiny_lora()
    module = model.model.layers[0].mlp.down_proj
    if where == "forward":
        module.register_forward_hook(lambda module, inputs, output: output * torch.inf)
    else:
        module.register_forward_hook(
            lambda module, inputs, output: output.register_hook(lambda grad: grad * torch.inf) and None
        )
    loop = make_loop(model, UNEQUAL, tmp_path, max_steps=6)
    with pytest.raises(TrainingStopped, match=r"model\.layers\.0\.mlp\.down_proj"):
        loop.fit()


# ---- the end ----


def test_ctrl_c_saves_after_the_update_and_leaves_with_130(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    loop = make_loop(tiny_lora(), UNEQUAL, tmp_path, objective=Signalling(at=2), max_steps=50)
    with pytest.raises(Interrupted, match=r"stopped at step \d+ of 50; .*--resume") as stopped:
        loop.fit()
    assert stopped.value.exit_code == 130
    found = checkpoint.latest(tmp_path / "checkpoints")
    assert found and found.step == loop.step >= 1
    assert signal.getsignal(signal.SIGINT) == before


def test_evaluation_is_the_mean_over_all_supervised_tokens(tmp_path):
    model = tiny_llama()
    loop = make_loop(model, UNEQUAL, tmp_path, held_out=UNEQUAL, budget=20)
    total, count = 0.0, 0
    for row in UNEQUAL:
        ids = torch.tensor(row.input_ids).long()
        logits = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        chosen = torch.tensor(row.supervised)[1:]
        total -= logits[torch.arange(len(ids) - 1), ids[1:]][chosen].sum().item()
        count += int(chosen.sum())
    assert loop.evaluate() == {"loss": pytest.approx(total / count, abs=1e-5)}
    assert not math.isnan(evaluate(model, Objective(), UNEQUAL, loop.how, loop.accelerator)["loss"])


def test_the_log_has_a_line_for_every_logged_step_and_evaluation(tmp_path):
    loop = make_loop(tiny_lora(), UNEQUAL, tmp_path, held_out=UNEQUAL, max_steps=7, logging_steps=3, eval_steps=2)
    loop.fit()
    log = read_log(tmp_path)
    assert [line["step"] for line in log] == [2, 3, 4, 6, 7]
    assert [line["step"] for line in log if "eval_loss" in line] == [2, 4, 6, 7]


def test_penalties_of_adapters_reach_the_gradient(tmp_path, monkeypatch):
    monkeypatch.setattr(Lora, "penalty", lambda self: self.lora_A.weight.square().sum())
    loop = make_loop(tiny_lora(), make_rows([6, 5, 4, 3]), tmp_path, max_steps=1, max_grad_norm=1e9, learning_rate=0.0)
    weights = {name: p.detach().clone() for name, p in loop.parameters.items() if "lora_A" in name}
    loop.fit()
    # B is zero at the start, so that all of A's gradient comes from the penalty.
    for name, weight in weights.items():
        torch.testing.assert_close(loop.parameters[name].grad, 2 * weight)
