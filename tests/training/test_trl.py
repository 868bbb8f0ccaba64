"""DPO's trajectory beside TRL's DPOTrainer: the same pairs, in the same order, from the same start."""

from __future__ import annotations

import warnings

import pytest

from smidgen.losses.preference import PreferenceLoss
from smidgen.models.peft_model import PeftModel
from smidgen.training.loop import read_log
from smidgen.training.preference import Preference
from tests.conftest import tiny_llama
from tests.training.conftest import make_loop, make_pairs, save_tiny_model

STEPS, SIZE = 20, 4
LENGTHS = [(5 + 7 * at % 11, 5 + 5 * at % 13) for at in range(STEPS * SIZE)]
PROMPTS = [2 + at % 3 for at in range(STEPS * SIZE)]


@pytest.mark.slow
@pytest.mark.parametrize("beforehand", [False, True])
def test_the_first_steps_are_those_of_trl(tmp_path, beforehand, monkeypatch):
    trl, peft, datasets = (pytest.importorskip(name) for name in ("trl", "peft", "datasets"))
    from transformers import AutoTokenizer

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

    pairs = make_pairs(LENGTHS, PROMPTS)
    rows = [
        {
            "prompt_ids": pair.chosen.input_ids[:prompt].tolist(),
            "chosen_ids": pair.chosen.input_ids[prompt:].tolist(),
            "rejected_ids": pair.rejected.input_ids[prompt:].tolist(),
        }
        for pair, prompt in zip(pairs, PROMPTS)
    ]
    settings = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"),
        beta=0.1,
        per_device_train_batch_size=SIZE,
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_steps=1,
        train_sampling_strategy="sequential",
        precompute_ref_log_probs=beforehand,
        gradient_checkpointing=False,
        max_length=None,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        trainer = Trainer(
            model=tiny_llama(),
            args=settings,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(save_tiny_model(tmp_path / "tokens")),
            peft_config=peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
    trainer.model.save_pretrained(tmp_path / "start")
    trainer.train()
    theirs = [line for line in trainer.state.log_history if "loss" in line]

    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "start", is_trainable=True)
    objective = Preference(PreferenceLoss({"sigmoid": 1.0}, beta=0.1))
    objective.begin(model, as_base=True)
    loop = make_loop(model, pairs, tmp_path / "ours", objective=objective, max_steps=STEPS, batch_size=SIZE, budget=512)
    monkeypatch.setattr(loop, "_rows_of", lambda step: list(range(step * SIZE, (step + 1) * SIZE)))
    loop.fit()
    ours = read_log(tmp_path / "ours")
    assert len(ours) == len(theirs) == STEPS
    for mine, other in zip(ours, theirs):
        for key in ("loss", "rewards/margins", "rewards/chosen", "grad_norm"):
            assert mine[key] == pytest.approx(other[key], abs=1e-4, rel=1e-4), (mine["step"], key)
    assert ours[-1]["rewards/margins"] > 0.01
