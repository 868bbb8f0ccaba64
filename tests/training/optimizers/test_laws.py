"""What holds for every optimizer: what a step computes, resuming to the bit, learning, the names of the states."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from smidgen.adapters.methods.lora import LoraConfig
from smidgen.errors import UsageError
from smidgen.models.peft_model import get_peft_model
from smidgen.quant.codes import dynamic_book
from smidgen.recipe_parts import Optimizer
from smidgen.training import checkpoint
from smidgen.training.loop import read_log
from smidgen.training.optimizers import make_optimizer, sliced
from smidgen.training.optimizers.blockwise import BLOCK
from smidgen.training.optimizers.states import SMALLEST, is_eight_bit, is_paged, layout_of, rule_of, state_bytes
from tests.conftest import tiny_llama
from tests.training.conftest import TRAIN, make_loop, make_rows

OPTIMIZERS: tuple[str, ...] = get_args(Optimizer)
LORA = {"r": 64, "target_modules": ["q_proj", "down_proj", "embed_tokens"]}
ROWS = make_rows([5, 12, 7, 3, 9, 16, 4, 11, 6, 8], prompt=2)
every_optimizer = pytest.mark.parametrize("optim", OPTIMIZERS)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """So that tensors of these tests are several slices, the last of them cut short."""
    monkeypatch.setattr(sliced, "SLICE", 6 * BLOCK)


def model_of(kind: str) -> Any:
    """A model with matrices on both sides of the size from which states are in 8 bits, with vectors, an embedding."""
    model = tiny_llama(hidden_size=64, intermediate_size=132)
    torch.manual_seed(3)
    return model if kind == "full" else get_peft_model(model, LoraConfig(**LORA))


# ---- what a step computes ----


def nearest(x: Tensor, signed: bool) -> Tensor:
    """Numbers after they were stored in 8 bits, found by looking at all 256 codes, in float64."""
    code = dynamic_book(signed).double()
    flat = x.flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    scaled = blocks / largest.clamp(min=1e-300)
    return (code[(scaled[..., None] - code).abs().argmin(-1)] * largest).flatten()[: len(flat)].view_as(x)


def closed_form(optim: str, start: Tensor, gradients: list[Tensor], rate: float, decay: float, narrow: bool) -> Tensor:
    """Where updates by these gradients lead, by the papers' formulas in float64."""
    p, m, v = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    rows, columns = torch.zeros(p.shape[:1]).double(), torch.zeros(p.shape[-1:]).double()
    for t, g in enumerate((gradient.double() for gradient in gradients), start=1):
        p = p * (1 - rate * decay)
        if rule_of(optim) == "adamw":
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            p = p - rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        elif rule_of(optim) == "lion":
            p, m = p - rate * torch.sign(0.9 * m + 0.1 * g), 0.99 * m + 0.01 * g
        else:
            beta = 1 - t**-0.8
            if p.ndim == 2:
                rows = beta * rows + (1 - beta) * (g**2 + 1e-30).mean(1)
                columns = beta * columns + (1 - beta) * (g**2 + 1e-30).mean(0)
                u = g / (rows[:, None] * columns / rows.mean()).sqrt()
            else:
                v = beta * v + (1 - beta) * (g**2 + 1e-30)
                u = g / v.sqrt()
            p = p - rate * u / max(1.0, float((u**2).mean().sqrt()))
        if narrow:
            m, v = nearest(m, signed=True), nearest(v, signed=False)
    return p


@every_optimizer
def test_steps_are_the_papers_formulas(optim, tmp_path):
    model = model_of("full")
    train = replace(TRAIN, optim=optim, weight_decay=0.1)
    optimizer = make_optimizer(model, train, tmp_path)
    start = {name: parameter.detach().clone() for name, parameter in optimizer.named.items()}
    torch.manual_seed(5)
    gradients = {name: [torch.randn_like(p) * 0.01 for _ in range(3)] for name, p in start.items()}
    for step in range(3):
        for name, parameter in optimizer.named.items():
            parameter.grad = gradients[name][step]
        optimizer.step()
    for name, parameter in optimizer.named.items():
        narrow = is_eight_bit(optim) and parameter.numel() >= SMALLEST and "embed" not in name
        decay = 0.1 if parameter.ndim > 1 else 0.0
        expected = closed_form(optim, start[name], gradients[name], 1e-2, decay, narrow)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=2e-6, atol=2e-7, msg=name)


@every_optimizer
def test_a_parameter_without_a_gradient_stays_as_it_is(optim, tmp_path):
    model = model_of("full")
    optimizer = make_optimizer(model, replace(TRAIN, optim=optim), tmp_path)
    before = {name: p.detach().clone() for name, p in optimizer.named.items()}
    moved = "model.norm.weight"
    optimizer.named[moved].grad = torch.ones(64)
    optimizer.step()
    assert {name for name, p in optimizer.named.items() if not torch.equal(p, before[name])} == {moved}
    assert {key.rpartition(".")[0] for key in optimizer.tensors()} == {moved}


@every_optimizer
def test_a_transposed_parameter_moves_as_any_other(optim, tmp_path):
    torch.manual_seed(1)
    start, gradient = torch.randn(96, 64), torch.randn(96, 64)
    moved = []
    for weight in (start.clone(), start.t().contiguous().t()):
        model = nn.Module()
        model.weight = nn.Parameter(weight)
        optimizer = make_optimizer(model, replace(TRAIN, optim=optim), tmp_path)
        for _ in range(2):
            model.weight.grad = torch.empty_like(model.weight).copy_(gradient)  # laid out as autograd does it
            optimizer.step()
        moved.append(model.weight.detach())
    torch.testing.assert_close(*moved, rtol=1e-6, atol=1e-6)
    assert not torch.equal(moved[0], start)


# ---- in a run ----


def opened(folder: Path) -> checkpoint.Checkpoint:
    state = json.loads((folder / checkpoint.STATE).read_text(encoding="utf-8"))
    return checkpoint.Checkpoint(folder, state["step"], state)


@every_optimizer
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_40_steps_are_20_and_20_after_a_checkpoint(optim, kind, tmp_path):
    options = {"optim": optim, "max_steps": 40, "lr_scheduler_type": "cosine", "save_steps": 20, "weight_decay": 0.1}
    options |= {"loraplus_lr_ratio": 4.0} if kind == "lora" else {}
    straight = make_loop(model_of(kind), ROWS, tmp_path / "straight", **options)
    straight.fit()
    resumed = make_loop(model_of(kind), ROWS, tmp_path / "resumed", **options)
    resumed.resume(opened(tmp_path / "straight/checkpoints/step-20"))
    resumed.fit()
    for name, parameter in straight.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name]), name
    one, two = (
        load_file(tmp_path / name / "checkpoints/step-40" / checkpoint.OPTIMIZER) for name in ("straight", "resumed")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert {key.rpartition(".")[0] for key in one} == straight.parameters.keys()
    assert sum(state.nbytes for state in one.values()) == state_bytes(straight.model, optim)
    losses = [line["loss"] for line in read_log(tmp_path / "straight")]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("optim", [name for name in OPTIMIZERS if is_paged(name)])
def test_pages_change_no_bit(optim, tmp_path):
    trained = {}
    for name in (optim, optim.removeprefix("paged_")):
        loop = make_loop(model_of("full"), ROWS, tmp_path / name, optim=name, max_steps=6, weight_decay=0.1)
        loop.fit()
        trained[name] = loop.parameters | loop.optimizer.tensors()
        assert [path.name for path in (tmp_path / name).iterdir()] == ["log.jsonl"]  # the file of states has no name
    one, two = trained.values()
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


# ---- what is refused ----


def test_states_of_another_kind_are_refused(tmp_path):
    loop = make_loop(model_of("full"), ROWS, tmp_path, optim="adamw_8bit", max_steps=1)
    loop.fit()
    loop.save()
    found = checkpoint.latest(tmp_path / "checkpoints")
    other = make_loop(model_of("full"), ROWS, tmp_path, optim="lion", max_steps=1)
    assert found
    with pytest.raises(UsageError, match=r"exp_avg_sq_absmax' of shape \(33,\) belongs to no parameter"):
        other.resume(found)


def test_a_state_that_is_missing_is_named(tmp_path):
    loop = make_loop(model_of("full"), ROWS, tmp_path, max_steps=1)
    loop.fit()
    states = loop.optimizer.tensors()
    del states["model.norm.weight.exp_avg"]
    loop.optimizer.tensors = lambda: states
    loop.save()
    found = checkpoint.latest(tmp_path / "checkpoints")
    other = make_loop(model_of("full"), ROWS, tmp_path, max_steps=1)
    assert found
    with pytest.raises(UsageError, match=r"'model.norm.weight.exp_avg' is missing"):
        other.resume(found)


@pytest.mark.parametrize(
    ("optim", "expected"),
    [("adamw", 8), ("paged_adamw", 8), ("lion", 4), ("adamw_8bit", 2 + 8 / BLOCK), ("lion_8bit", 1 + 4 / BLOCK)],
)
def test_bytes_for_each_parameter(optim, expected):
    model = nn.Linear(256, 256, bias=False)
    assert state_bytes(model, optim) == 4 + 256 * 256 * expected
    assert sum(like.nbytes for like in layout_of(model, "adafactor")["weight"].values()) == 4 + 4 * (256 + 256)
