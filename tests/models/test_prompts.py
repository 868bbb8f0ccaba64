"""Prompts in use: against the same tokens written out, with caches, padding, several at once, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import smidgen
from smidgen.data.packing import Batch
from smidgen.errors import SmidgenError, TargetError, UsageError
from smidgen.models.fuse import fused
from smidgen.models.generate import generate_batch
from smidgen.models.scores import token_losses
from tests.conftest import logits, perturb, tiny_gpt2, tiny_llama, tokens, toy

KINDS: dict[str, Any] = {
    "prompt": lambda: smidgen.PromptTuningConfig(num_virtual_tokens=5),
    "p-tuning": lambda: smidgen.PromptEncoderConfig(num_virtual_tokens=3),
    "prefix": lambda: smidgen.PrefixTuningConfig(num_virtual_tokens=4),
}
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def adapted(kind: str, build: Any = tiny_llama) -> Any:
    torch.manual_seed(1)
    model = smidgen.get_peft_model(build(), KINDS[kind]()).eval()
    perturb(model, scale=0.5)
    return model


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, kind: str) -> Any:
    return adapted(kind, MODELS[request.param])


class Words:
    """As much of a tokenizer as generating needs."""

    pad_token_id, eos_token_id = 0, None


# ---- against the same tokens, written out ----


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_soft_tokens_that_are_embeddings_answer_as_the_tokens(build: Any) -> None:
    model, before = adapted("prompt", build), tokens(rows=1, length=5)
    with torch.no_grad():
        model.adapters["default"].prompt_embeddings.copy_(model.get_input_embeddings()(before[0]))
    whole = torch.cat([before.expand(3, -1), tokens()], dim=1)
    torch.testing.assert_close(logits(model, tokens()), logits(build(), whole)[:, 5:])


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_prefix_of_their_keys_and_values_answers_as_the_tokens(build: Any) -> None:
    model, before = adapted("prefix", build), tokens(rows=1, length=4)
    cache = build()(before, use_cache=True).past_key_values
    states = torch.stack([torch.stack([layer.keys, layer.values]) for layer in cache.layers])  # (L, 2, 1, K, N, W)
    with torch.no_grad():
        model.adapters["default"].prompt_embeddings.copy_(states.permute(4, 0, 1, 2, 3, 5).flatten(1))
    whole = torch.cat([before.expand(3, -1), tokens()], dim=1)
    torch.testing.assert_close(logits(model, tokens()), logits(build(), whole)[:, 4:])


def test_a_prompt_starts_as_a_text(stories260k: Path) -> None:
    from smidgen.models.load import load_model

    base, tokenizer = load_model(stories260k, "float32", device=torch.device("cpu"), say=lambda line: None)
    config = smidgen.PromptTuningConfig(
        num_virtual_tokens=40, prompt_tuning_init="TEXT", prompt_tuning_init_text="Once upon a time there was a cat."
    )
    ids = tokenizer("Once upon a time there was a cat.", add_special_tokens=False)["input_ids"]
    model = smidgen.get_peft_model(base, config)
    expected = model.get_input_embeddings()(torch.tensor(ids * 40)[:40])
    torch.testing.assert_close(model.adapters["default"].prompt_embeddings, expected)
    assert config.tokenizer_name_or_path == str(stories260k)


# ---- caches, padding, rows ----


def greedy(model: Any, ids: Tensor, count: int = 6) -> Tensor:
    """Generated without a cache, one call a token."""
    for _ in range(count):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    return ids


def test_generating_with_a_cache_equals_calls_without(model: Any) -> None:
    ids = tokens(length=7)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), greedy(model, ids))
    assert torch.equal(model.generate(ids, use_cache=False, **options), greedy(model, ids))
    answer = model(ids[:, :5], use_cache=True)
    answer = model(ids[:, 5:], past_key_values=answer.past_key_values)
    torch.testing.assert_close(answer.logits, logits(model, ids)[:, 5:])


def test_prompts_of_other_lengths_in_one_batch_answer_as_alone(model: Any) -> None:
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [11]]
    together, *alone = (
        generate_batch(model, Words(), rows, max_new_tokens=6, stop_ids=set())  # type: ignore[arg-type]
        for rows in (prompts, *([prompt] for prompt in prompts))
    )
    assert together == [answer for answers in alone for answer in answers]


def test_beams_answer_as_one_row_at_a_time(model: Any) -> None:
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    rows = tokens(length=6)
    expected = torch.cat([model.generate(row[None], **options) for row in rows])
    assert torch.equal(model.generate(rows, **options), expected)


def mixed() -> Any:
    model = adapted("prompt")
    for name, config in {
        "short": smidgen.PromptTuningConfig(num_virtual_tokens=2),
        "prefix": KINDS["prefix"](),
        "lora": smidgen.LoraConfig(target_modules=["q_proj", "up_proj"]),
    }.items():
        model.add_adapter(name, config)
    model.set_adapter(["short", "prefix", "lora"])
    perturb(model, seed=7, scale=0.5)
    return model


NAMES = ["prefix", "default", "__base__", "lora", "short"]


def test_each_row_its_own_kind_of_adapter() -> None:
    model, ids = mixed(), tokens(rows=5, length=8)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    answer, said = model(ids, adapter_names=NAMES).logits, model.generate(ids, adapter_names=NAMES, **options)
    for row, name in enumerate(NAMES):
        if name != "__base__":
            model.set_adapter(name)
        with model.disable_adapter() if name == "__base__" else warnings.catch_warnings():
            torch.testing.assert_close(answer[row], logits(model, ids[row : row + 1])[0], atol=1e-5, rtol=1e-5)
            assert torch.equal(said[row], model.generate(ids[row : row + 1], **options)[0]), name


@pytest.mark.parametrize("names", [["prefix", "default"], ["default", "prefix"], ["default", "short"]], ids="-".join)
def test_prompts_stack(names: list[str]) -> None:
    model, ids = mixed(), tokens(length=7)
    model.set_adapter(names)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), greedy(model, ids))
    stacked = logits(model, ids)
    for name in names:
        model.set_adapter(name)
        assert not torch.allclose(logits(model, ids), stacked, atol=1e-3)


# ---- losses ----


def batch(rows: int = 3, length: int = 9) -> Batch:
    ids = tokens(rows, length)
    labels = ids.masked_fill(torch.arange(length) < 4, -100)
    mask = torch.ones_like(ids)
    mask[1, 7:], labels[1, 7:] = 0, -100
    return Batch(ids, labels, mask, None, list(range(rows)), int((labels != -100).sum()))


def test_the_loss_of_training_is_that_of_the_model(model: Any) -> None:
    rows = batch()
    ours = token_losses(model, rows)[0].mean()
    theirs = model(rows.input_ids, attention_mask=rows.attention_mask, labels=rows.labels).loss
    torch.testing.assert_close(ours, theirs)
    model.train()
    ours.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    theirs.backward()
    for name, gradient in found.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


def test_kernels_under_the_model_change_nothing(kind: str) -> None:
    model, rows = adapted(kind), batch()
    expected = token_losses(model, rows)[0]
    expected_gradients = torch.autograd.grad(expected.sum(), [p for p in model.parameters() if p.requires_grad])
    with fused(model, lambda line: None):
        found = token_losses(model, rows)[0]
        gradients = torch.autograd.grad(found.sum(), [p for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-4)


def test_packed_rows_are_refused(model: Any) -> None:
    ids = tokens(rows=1, length=12)
    packed = Batch(ids, ids.clone(), None, torch.arange(6).repeat(2)[None], [0, 1], 10)
    with pytest.raises(UsageError, match=r"packed into one sequence cannot each have a prompt.*packing: false"):
        token_losses(model, packed)


def test_answers_have_the_callers_length(kind: str) -> None:
    model, ids = adapted(kind), tokens()
    answer = model(ids, output_hidden_states=True, use_cache=False)
    assert all(states.shape[:2] == ids.shape for states in answer.hidden_states) and answer.past_key_values is None
    assert torch.equal(model(ids, return_dict=False)[0], answer.logits)
    kept = torch.tensor([2, 7])
    torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, answer.logits[:, kept])
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, answer.logits[:, -3:])
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, answer.logits)


def test_transformers_trainer_trains_and_evaluates(kind: str, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row, "idle": 1} for row in tokens(rows=4, length=10)] * 4
    options: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 1}
    arguments = transformers.TrainingArguments(str(tmp_path), max_steps=12, learning_rate=3e-2, bf16=True, **options)
    trainer = transformers.Trainer(adapted(kind), arguments, train_dataset=rows, eval_dataset=rows[:4])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    answers: Any = trainer.predict(rows[:4]).predictions  # type: ignore[arg-type]
    assert answers.shape == (4, 10, 48)


# ---- files ----


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (smidgen.PromptTuningConfig, peft.PromptTuningConfig),
        (smidgen.PromptEncoderConfig, peft.PromptEncoderConfig),
        (smidgen.PrefixTuningConfig, peft.PrefixTuningConfig),
    ],
    ids=lambda kind: kind.__module__.partition(".")[0],
)
def test_a_file_is_trained_further(ours: Any, theirs: Any, tmp_path: Path) -> None:
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    options |= {"prefix_projection": True} if ours is smidgen.PrefixTuningConfig else {}
    for kind, library in ((ours, smidgen), (theirs, peft)):
        written = library.get_peft_model(tiny_llama(), kind(**options)).eval()
        perturb(written)
        written.save_pretrained(tmp_path / library.__name__)
        model = smidgen.PeftModel.from_pretrained(tiny_llama(), tmp_path / library.__name__, is_trainable=True)
        ids = tokens()
        torch.testing.assert_close(logits(model, ids), logits(written, ids)[:, -ids.shape[1] :], atol=1e-5, rtol=0)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        if library is smidgen:
            assert trained == {name for name, p in written.named_parameters() if p.requires_grad}
        logits(model, ids).square().mean().backward()
        assert trained and all(model.get_parameter(name).grad.abs().max() > 0 for name in trained)
        perturb(model, seed=8)
        model.save_pretrained(tmp_path / "again")
        again = smidgen.PeftModel.from_pretrained(tiny_llama(), tmp_path / "again")
        assert torch.equal(logits(again, ids), logits(model.eval(), ids))
        shape = load_file(tmp_path / "again" / "adapter_model.safetensors")["prompt_embeddings"].shape
        assert shape[0] == 4


# ---- what is refused ----


def encoder_decoder() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(vocab_size=48, d_model=32, d_ff=64, num_layers=2, num_heads=4))


def shared_layers() -> nn.Module:
    model = tiny_llama()
    model.config.num_kv_shared_layers = 1  # as Gemma 3n has them
    return model


REFUSED = {
    "toy": (toy, "prompt", {}, "a Toy takes none"),
    "encoder-decoder": (encoder_decoder, "prompt", {}, "has an encoder and a decoder"),
    "unlike layers": (shared_layers, "prefix", {}, "one shape in every layer"),
    "another width": (tiny_llama, "prompt", {"token_dim": 31}, "token_dim: 31, the model has 32"),
    "another depth": (
        tiny_llama,
        "prefix",
        {"num_layers": 3, "token_dim": 8},
        "token_dim: 8, the model has 16\nnum_layers: 3, the model has 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(case: str) -> None:
    build, kind, fields, words = REFUSED[case]
    model, config = build(), KINDS[kind]()
    vars(config).update(fields)
    with pytest.raises(TargetError, match=words):
        smidgen.get_peft_model(model, config)
    assert type(model) is type(build())


def test_calls_that_cannot_be_widened_are_refused(kind: str) -> None:
    model, ids = adapted(kind), tokens(length=6)
    calls: list[tuple[dict[str, Any], str]] = [
        ({"attention_mask": torch.ones(3, 1, 6, 6)}, "a mask of pairs"),
        (
            {"past_key_values": tiny_llama()(ids, use_cache=True).past_key_values},
            "6 tokens that were read without this prompt",
        ),
    ]
    for arguments, words in calls:
        with pytest.raises(UsageError, match=words):
            model(ids, **arguments)
    with pytest.raises(SmidgenError, match="a static cache has no room"):
        model.generate(ids, cache_implementation="static", max_new_tokens=3)


def test_wrong_options_are_one_error() -> None:
    wrong: Any = "GRU"
    for make, words in [
        (lambda: smidgen.PromptTuningConfig(num_virtual_tokens=0), "num_virtual_tokens: must be from 1"),
        (lambda: smidgen.PromptTuningConfig(prompt_tuning_init="TEXT"), "prompt_tuning_init_text"),
        (lambda: smidgen.PromptTuningConfig(prompt_tuning_init=wrong), "RANDOM, SAMPLE_VOCAB"),
        (lambda: smidgen.PromptEncoderConfig(encoder_reparameterization_type=wrong), "MLP or LSTM"),
    ]:
        with pytest.raises(UsageError, match=words):
            make()
