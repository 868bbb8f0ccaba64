"""Methods that follow the training: in the loop, after an interruption, and in transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import smidgen
from smidgen.adapters.attach import adapters_of
from smidgen.errors import UsageError
from smidgen.training import checkpoint
from tests.conftest import tiny_llama, tokens
from tests.training.conftest import make_loop, make_rows


def adalora(**options: Any) -> Any:
    torch.manual_seed(3)
    fields: dict[str, Any] = {"init_r": 6, "target_r": 2, "tfinal": 2, "target_modules": ["q_proj", "up_proj"]}
    return smidgen.get_peft_model(tiny_llama(), smidgen.AdaLoraConfig(**fields | options))


def ranks(model: Any) -> int:
    return sum(map(sum, model.peft_config["default"].rank_pattern.values()))


@pytest.mark.parametrize(("stopped", "optim"), [(3, "adamw"), (7, "adamw"), (3, "paged_lion_8bit"), (3, "adafactor")])
def test_a_resumed_run_allocates_as_an_uninterrupted_one(stopped: int, optim: str, tmp_path: Path) -> None:
    rows = make_rows([7, 9, 5, 8, 6, 10, 9, 7])
    straight = make_loop(adalora(), rows, tmp_path / "straight", max_steps=8, save_steps=stopped, optim=optim)
    straight.fit()
    assert ranks(straight.model) == 8
    again = make_loop(adalora(), rows, tmp_path / "again", max_steps=8, optim=optim)
    (tmp_path / "again" / "log.jsonl").write_text("")
    found = checkpoint.Checkpoint(*_at(tmp_path / "straight" / "checkpoints" / f"step-{stopped}"))
    again.resume(found)
    again.fit()
    for (name, expected), (_, actual) in zip(
        straight.model.named_parameters(), again.model.named_parameters(), strict=True
    ):
        assert torch.equal(actual, expected), name
    assert again.model.peft_config["default"].rank_pattern == straight.model.peft_config["default"].rank_pattern


def _at(folder: Path) -> tuple[Path, int, dict[str, Any]]:
    import json

    state = json.loads((folder / "state.json").read_text())
    return folder, state["step"], state


def test_a_schedule_without_room_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave none of 4 updates"):
        make_loop(adalora(tfinal=4), make_rows([7, 9, 5, 8]), tmp_path / "run", max_steps=4)


def test_in_transformers_trainer_by_one_callback(tmp_path: Path) -> None:
    ids = [{"input_ids": row, "labels": row} for row in tokens(rows=4, length=10)] * 4
    options: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 1}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    options |= {"max_steps": 8, "save_steps": 4}
    models = []
    for weight in (0.0, 5.0):
        model = adalora(orth_reg_weight=weight)
        arguments = transformers.TrainingArguments(str(tmp_path / str(weight)), learning_rate=1e-2, **options)
        trainer = transformers.Trainer(model, arguments, train_dataset=ids, callbacks=[smidgen.AdapterCallback()])
        trainer.train()
        models.append(model)
        assert ranks(model) == 8 and model.peft_config["default"].total_step == 8
        saved = smidgen.PeftModel.from_pretrained(tiny_llama(), tmp_path / str(weight) / "checkpoint-8")
        assert sum(map(sum, saved.peft_config["default"].rank_pattern.values())) == 8
    gaps = []
    for model in models:
        factors: list[Any] = [adapter.lora_A for _, adapter in adapters_of(model, "default")]
        gaps.append(sum(float((a @ a.T - torch.eye(6)).norm().detach()) for a in factors))
    assert gaps[1] < gaps[0]
    with pytest.raises(UsageError, match="take bf16"):
        smidgen.AdapterCallback().on_train_begin(SimpleNamespace(fp16=True), None, None)
