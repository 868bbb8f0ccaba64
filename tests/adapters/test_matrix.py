"""What prompts, (IA)^3 over 4 bits and AdaLoRA can do: every cell of the table of docs/methods.md is a test.

`python -m tests.adapters.test_matrix` prints the table.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import smidgen
from smidgen.adapters.base import Adapter
from smidgen.errors import MergeError
from smidgen.models.generate import generate_batch
from smidgen.training import checkpoint
from tests.conftest import logits, perturb, tiny_llama, tokens
from tests.laws.cases import on_base
from tests.training.conftest import make_loop, make_rows

PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
ADALORA = {"init_r": 4, "target_r": 2, "tfinal": 1, "total_step": 6}
# row of the table: how its linear layers are stored, and the configuration
ROWS: dict[str, tuple[str, Callable[[], Any]]] = {
    "`prompt_tuning`": ("plain", functools.partial(smidgen.PromptTuningConfig, **PROMPT)),
    "`p_tuning`": ("plain", functools.partial(smidgen.PromptEncoderConfig, **PROMPT)),
    "`prefix_tuning`": ("plain", functools.partial(smidgen.PrefixTuningConfig, **PROMPT, prefix_projection=True)),
    "`p_tuning_v2`": ("plain", functools.partial(smidgen.PrefixTuningConfig, **PROMPT)),
    "`ia3`, base in NF4": ("nf4", smidgen.IA3Config),
    "`adalora`": ("plain", functools.partial(smidgen.AdaLoraConfig, **ADALORA)),
}
MERGES = {"`ia3`, base in NF4", "`adalora`"}
UNMERGED = "it cannot be merged"


def base(row: str) -> Any:
    return on_base(tiny_llama, ROWS[row][0])()


def adapted(row: str, moved: bool = True) -> Any:
    torch.manual_seed(3)
    model = smidgen.get_peft_model(base(row), ROWS[row][1]()).eval()
    if moved:
        perturb(model, scale=0.3)
    return model


def loop(row: str, folder: Path, **options: Any) -> Any:
    rows = make_rows([9, 12, 7, 10] * 3)
    return make_loop(adapted(row, moved=False), rows, folder, learning_rate=3e-2, **options)


def trains(row: str, folder: Path) -> None:
    run = loop(row, folder, max_steps=30)
    start = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}
    run.fit()
    adapters = [module for module in run.model.modules() if isinstance(module, Adapter)]
    spent = {parameter for adapter in adapters if adapter.is_idle() for parameter in adapter.parameters()}
    moved = [not torch.equal(p, start[name]) for name, p in run.parameters.items() if p not in spent]
    assert moved and all(moved)
    losses = [line["loss"] for line in read_log(folder)]
    assert sum(losses[-3:]) < sum(losses[:3])


def read_log(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def checkpoints(row: str, folder: Path) -> None:
    found = []
    for enabled in (False, True):
        model = adapted(row).train()
        if enabled:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        logits(model, tokens()).square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)


def resumes(row: str, folder: Path) -> None:
    straight = loop(row, folder, max_steps=6, save_steps=3)
    straight.fit()
    for later in (folder / "checkpoints").glob("step-6"):
        shutil.rmtree(later)
    found = checkpoint.latest(folder / "checkpoints")
    assert found and found.step == 3
    torch.manual_seed(99)
    second = loop(row, folder, max_steps=6, save_steps=3)
    second.resume(found)
    second.fit()
    assert second.step == 6
    for name, parameter in straight.parameters.items():
        assert torch.equal(parameter, second.parameters[name]), name


def saves(row: str, folder: Path) -> None:
    model = adapted(row)
    model.save_pretrained(folder)
    again = smidgen.PeftModel.from_pretrained(base(row), folder)
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))
    further = smidgen.PeftModel.from_pretrained(base(row), folder, is_trainable=True)
    logits(further, tokens()).square().mean().backward()
    trained = [parameter for parameter in further.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad.abs().max() > 0 for parameter in trained)


def generates(row: str, folder: Path) -> None:
    model, ids = adapted(row), tokens(length=7)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = ids
    for _ in range(6):
        expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(ids, use_cache=True, **options), expected)


def pads(row: str, folder: Path) -> None:
    model, prompts = adapted(row), [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [11]]
    words: Any = SimpleNamespace(pad_token_id=0, eos_token_id=None)
    groups = [prompts, *([prompt] for prompt in prompts)]
    together, *alone = (generate_batch(model, words, group, max_new_tokens=6, stop_ids=set()) for group in groups)
    assert together == [answer for answers in alone for answer in answers]


def merges(row: str, folder: Path) -> None:
    model = adapted(row)
    expected = logits(model, tokens())
    if row not in MERGES:
        with pytest.raises(MergeError, match=UNMERGED):
            model.merge_and_unload()
        assert torch.equal(logits(model, tokens()), expected)
        return
    plain = model.merge_and_unload()
    assert type(plain) is type(tiny_llama())
    torch.testing.assert_close(logits(plain, tokens()), expected, atol=2e-5, rtol=1e-5)


def rows(row: str, folder: Path) -> None:
    model = adapted(row)
    model.add_adapter("second", ROWS[row][1]())
    model.set_adapter("second")
    perturb(model, seed=9, scale=0.3)
    ids = tokens()
    answer = model(ids, adapter_names=["second", "__base__", "default"]).logits
    for index, name in ((0, "second"), (2, "default")):
        model.set_adapter(name)
        torch.testing.assert_close(answer[index], logits(model, ids[index : index + 1])[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(answer[1], logits(base(row), ids[1:2])[0], atol=1e-5, rtol=1e-5)


COLUMNS: dict[str, Callable[[str, Path], None]] = {
    "trains": trains,
    "checkpointing": checkpoints,
    "resumes to the bit": resumes,
    "saved, loaded, trained further": saves,
    "generates with a cache": generates,
    "left-padded batch": pads,
    "merged": merges,
    "one adapter per row": rows,
}


def cell(row: str, column: str) -> str:
    return f'refused: "{UNMERGED}"' if column == "merged" and row not in MERGES else "yes"


def table() -> str:
    """The table of docs/methods.md."""
    lines = [["method", *COLUMNS], *([row, *(cell(row, column) for column in COLUMNS)] for row in ROWS)]
    head, *body = (f"| {' | '.join(line)} |\n" for line in lines)
    return "".join([head, "|---" * (len(COLUMNS) + 1) + "|\n", *body])


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", ROWS)
def test_cell(row: str, column: str, tmp_path: Path) -> None:
    COLUMNS[column](row, tmp_path)


def test_the_table_of_the_page_is_what_is_tested() -> None:
    page = Path(__file__).parents[2] / "docs" / "methods.md"
    assert table() in page.read_text(encoding="utf-8"), f"put this into docs/methods.md:\n\n{table()}"


if __name__ == "__main__":
    print(table(), end="")
