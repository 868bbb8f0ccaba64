"""Two processes that share each update learn from preferences what one does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smidgen.losses.preference import PreferenceLoss
from smidgen.recipe import GeneralRecipe
from smidgen.training import launch
from smidgen.training.forgetting import Controls
from smidgen.training.loop import read_log
from smidgen.training.objectives import Objective
from smidgen.training.preference import Kto, Preference
from tests.conftest import perturb
from tests.training.conftest import make_labelled, make_loop, make_pairs, make_rows, tiny_lora
from tests.training.test_processes import PATH, SMALL, TOLERANCE

LENGTHS = [(7, 12), (9, 6), (16, 10), (5, 8), (11, 11), (6, 14), (13, 7), (8, 9), (10, 15)]
PAIRS = make_pairs(LENGTHS, [3, 4, 5, 2, 6, 3, 4, 5, 6])  # the last update has a single pair: one process has none
PROGRAM = "import sys; from tests.training.test_preference_processes import act; act(sys.argv[1])"
OBJECTIVES = {
    "dpo": lambda: Preference(PreferenceLoss({"sigmoid": 1.0, "sft": 0.5})),
    "orpo": lambda: Preference(PreferenceLoss({"orpo": 1.0})),
    "kto": Kto,
    "held": Objective,
}
GENERAL = make_rows([12, 5, 9, 16, 7], prompt=0, seed=5)
HELD = GeneralRecipe(share=0.3, ewc=5.0, l2=0.1, kl=0.5)


def train(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Train a policy that is away from the base, its reference; answer what was trained."""
    folder.mkdir(parents=True, exist_ok=True)
    model, objective = tiny_lora(), OBJECTIVES[name]()
    perturb(model, scale=0.3)
    rows = {"kto": make_labelled(PAIRS), "held": PAIRS.rows}.get(name, PAIRS)
    options = {"max_steps": 3, "budget": 48, "batch_size": 6 if name == "kto" else 4} | SMALL
    loop = make_loop(model, rows, folder, objective=objective, held_out=rows, **options)
    if name == "held":
        loop.controls = Controls(HELD, model, GENERAL, loop.how, seed=1)
    loop.fit()
    return {key: tensor.detach().clone() for key, tensor in loop.parameters.items()}


def act(place: str) -> None:
    for name in OBJECTIVES:
        tensors = train(Path(place) / name, name)
        if launch.rank() == 0:
            save_file(tensors, Path(place) / name / "trained.safetensors")


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", PATH)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    both = tmp_path / "both"
    both.mkdir()
    assert launch.launch(2, [sys.executable, "-c", PROGRAM, str(both)], lambda line: None) == 0
    for name in OBJECTIVES:
        alone = train(tmp_path / name, name)
        shared = load_file(both / name / "trained.safetensors")
        close = [torch.isclose(shared[key], tensor, rtol=0, atol=TOLERANCE).flatten() for key, tensor in alone.items()]
        assert torch.cat(close).float().mean() > 0.999
        lines = [read_log(place) for place in (tmp_path / name, both / name)]
        for lone, line in zip(*lines, strict=True):
            for key in lone.keys() - {"tokens_per_second", "step"}:
                assert line[key] == pytest.approx(lone[key], rel=TOLERANCE, abs=TOLERANCE), (name, lone["step"], key)
