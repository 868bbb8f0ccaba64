"""An adapted model under transformers' Trainer and TRL's SFTTrainer, both unchanged: bf16, save, resume, merge."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import smidgen
from smidgen.models.peft_model import AdaptedModel
from tests.conftest import logits, tiny_llama, tokens


def adapted() -> Any:
    torch.manual_seed(3)
    config = smidgen.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    return smidgen.get_peft_model(tiny_llama(), config)


def rows() -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in tokens(rows=4, length=10)] * 6


def arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    defaults = {"per_device_train_batch_size": 4, "max_steps": 6, "save_steps": 3, "learning_rate": 1e-2, "bf16": True}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "seed": 1}
    return transformers.TrainingArguments(output_dir=str(folder), **(defaults | quiet | options))


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_trainer_trains_in_bf16_saves_resumes_and_merges(tmp_path: Path) -> None:
    before = logits(tiny_llama(), tokens())
    trainer = transformers.Trainer(adapted(), arguments(tmp_path / "straight"), train_dataset=rows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    checkpoint = tmp_path / "straight" / "checkpoint-6"
    assert not (checkpoint / "pytorch_model.bin").exists()
    assert sum(tensor.numel() for tensor in adapter_tensors(checkpoint).values()) < 20_000

    resumed = transformers.Trainer(adapted(), arguments(tmp_path / "straight"), train_dataset=rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    straight = dict(trainer.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, straight[name]), name

    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    expected = logits(model, tokens())
    assert (expected - before).abs().max() > 0.1
    loaded = smidgen.PeftModel.from_pretrained(tiny_llama(), checkpoint)
    torch.testing.assert_close(logits(loaded, tokens()), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens()), before)
    merged = model.merge_and_unload()
    assert not isinstance(merged, AdaptedModel)
    torch.testing.assert_close(logits(merged, tokens()), expected, atol=1e-4, rtol=1e-4)


def test_trainer_ends_with_its_best_adapter(tmp_path: Path) -> None:
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    settings = arguments(tmp_path, learning_rate=0.5, **options)
    trainer = transformers.Trainer(adapted(), settings, train_dataset=rows(), eval_dataset=rows()[:8])
    trainer.train()
    best = adapter_tensors(Path(str(trainer.state.best_model_checkpoint)))
    trainer.save_model(str(tmp_path / "best"))
    saved = adapter_tensors(tmp_path / "best")
    assert all(torch.equal(best[key], saved[key]) for key in best)


def test_trls_sft_trainer(tmp_path: Path, stories260k: Path) -> None:
    trl = pytest.importorskip("trl")
    import datasets

    warnings.simplefilter("ignore")
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories260k)
    data = datasets.Dataset.from_dict({"text": [f"Once upon a time there was a cat number {i}." for i in range(16)]})

    def base() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(stories260k)

    def run(resume: str | None = None) -> Any:
        torch.manual_seed(3)
        config = smidgen.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear")
        model = smidgen.get_peft_model(base(), config)
        args = trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=5e-3,
            bf16=True,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            max_length=64,
        )
        trainer = trl.SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = run()
    losses = [entry["loss"] for entry in straight.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    resumed = run(str(tmp_path / "checkpoint-2"))
    expected = dict(straight.model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in resumed.model.named_parameters())
    model = straight.accelerator.unwrap_model(straight.model, keep_fp32_wrapper=False).eval()
    ids = torch.tensor([tokenizer("Once upon a time")["input_ids"]])
    answer = logits(model, ids)
    torch.testing.assert_close(
        logits(smidgen.PeftModel.from_pretrained(base(), tmp_path / "checkpoint-4"), ids), answer
    )
    torch.testing.assert_close(logits(model.merge_and_unload(), ids), answer, atol=1e-4, rtol=1e-4)
