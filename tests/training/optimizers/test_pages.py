"""States in a mapped file: nothing stays behind, and a run goes on under a limit that it exceeds without them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from smidgen.errors import UsageError
from smidgen.recipe import TrainRecipe, load_recipe
from smidgen.training.optimizers import make_optimizer
from smidgen.training.optimizers.pages import Pages
from smidgen.training.optimizers.states import PAGED, held_bytes, layout_of, state_bytes
from smidgen.training.run import train
from tests.conftest import tiny_llama
from tests.training.conftest import WORDS, write_recipe

ROOT = Path(__file__).parents[3]


def test_pages_are_zeros_that_keep_what_is_written(tmp_path):
    layout = layout_of(tiny_llama(), "paged_adamw_8bit")
    pages = Pages(tmp_path / "run", layout)
    states = {(name, what): pages[name, what] for name in layout for what in layout[name] if what != "step"}
    assert not any(state.any() for state in states.values())
    for number, (place, state) in enumerate(states.items()):
        assert state.shape == layout[place[0]][place[1]].shape and state.data_ptr() % 64 == 0
        state.fill_(number % 200)
    pages.release()
    assert all((state == number % 200).all() for number, state in enumerate(states.values()))


@pytest.mark.skipif(os.name == "nt", reason="an open file keeps its name there until it is closed")
def test_the_file_has_no_name(tmp_path):
    model = nn.Linear(64, 64)
    optimizer = make_optimizer(model, TrainRecipe(optim="paged_adamw"), tmp_path)
    model(torch.ones(64)).sum().backward()
    optimizer.step()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="what is shared with files is told apart there")
def test_states_are_not_memory_of_the_process_s_own(tmp_path):
    model = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(16))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert held_bytes(model, "paged_adamw") == PAGED < held_bytes(model, "adamw")
    optimizer = make_optimizer(model, TrainRecipe(optim="paged_adamw"), tmp_path)
    before = psutil.Process().memory_info()
    optimizer.step()
    after = psutil.Process().memory_info()
    size = 16 * 2**20 * 8
    assert after.data - before.data < size / 8
    assert after.rss - before.rss < size / 2


def test_room_for_the_file_is_looked_at_before_the_start(tmp_path, monkeypatch):
    path, needed = write_recipe(tmp_path), []

    def refuse(folder: Path, size: int) -> None:
        needed.append(size)
        raise UsageError("full")

    monkeypatch.setattr("smidgen.training.run.check_disk", refuse)
    for optim in ("adamw", "paged_adamw"):
        recipe, _ = load_recipe(path, [f"train.optim={optim}", "adapter={method: full}"])
        with pytest.raises(UsageError, match="full"):
            train(recipe, overwrite=True, say=lambda line: None)
    model = tiny_llama(tied=True, vocab_size=len(WORDS))
    assert needed[1] - needed[0] == state_bytes(model, "adamw")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mapped memory there alone")
def test_a_run_goes_on_under_a_limit_that_adamw_exceeds(tmp_path, stories260k):
    """20 steps of full tuning: adamw fails under the limit, paged_adamw ends with its weights and states to the bit."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
    large = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes))
    large.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    script = [sys.executable, str(ROOT / "benchmarks/optimizers.py"), f"--model={tmp_path / 'base'}"]
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        script, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "adamw under it: out of memory" in done.stdout
    assert "after 20 steps: equal to the bit" in done.stdout
