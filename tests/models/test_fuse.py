"""Under every kind of model the kernels give the losses and gradients of the model itself, and leave it as it was."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers

import smidgen
from smidgen import LoraConfig, get_peft_model, kernels
from smidgen.data.packing import IGNORED, Batch
from smidgen.errors import UsageError
from smidgen.models import fuse
from smidgen.models.fuse import fused
from smidgen.models.fused_modules import FusedModule
from smidgen.models.scores import token_losses
from tests.conftest import TINY, perturb, tiny_gpt2, tiny_llama

pytestmark = pytest.mark.skipif(kernels.instruction_set() == "reference", reason="no kernels: not built, or not wanted")


def of_kind(name: str, config: str = "", **options: Any) -> Callable[[], Any]:
    """A function that makes a random model of two layers."""

    def make() -> Any:
        torch.manual_seed(0)
        settings = getattr(transformers, config or f"{name}Config")(**TINY | {"head_dim": 8} | options)
        return getattr(transformers, f"{name}ForCausalLM")(settings).eval()

    return make


KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "llama": (tiny_llama, "2 whole blocks, 5 norms, 2 feed-forward layers, attention, cross-entropy"),
    "gpt2": (tiny_gpt2, "2 activations, attention, cross-entropy"),
    "qwen2": (of_kind("Qwen2"), "2 whole blocks, 5 norms, 2 feed-forward layers, attention, cross-entropy"),
    "qwen3": (of_kind("Qwen3"), "2 whole blocks, 9 norms, 2 feed-forward layers, attention, cross-entropy"),
    "mistral": (
        of_kind("Mistral", sliding_window=6),
        "2 whole blocks, 5 norms, 2 feed-forward layers, attention, cross-entropy",
    ),
    "gemma": (of_kind("Gemma"), "2 whole blocks, 5 norms, 2 feed-forward layers, attention, cross-entropy"),
    "gemma2": (
        of_kind("Gemma2", sliding_window=6, query_pre_attn_scalar=8),
        "2 whole blocks, 9 norms, 2 feed-forward layers, attention, cross-entropy",
    ),
    "gemma3": (
        of_kind("Gemma3", "Gemma3TextConfig", sliding_window=6, query_pre_attn_scalar=8),
        "2 whole blocks, 13 norms, 2 feed-forward layers, attention, cross-entropy",
    ),
    "phi3": (of_kind("Phi3"), "2 whole blocks, 5 norms, 2 feed-forward layers, attention, cross-entropy"),
    "stablelm": (of_kind("StableLm"), "2 feed-forward layers, attention, cross-entropy"),
    "gpt_neox": (of_kind("GPTNeoX", num_key_value_heads=4), "attention, cross-entropy"),
}


def padded() -> Batch:
    ids = torch.randint(3, 48, (3, 14), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(14) < torch.tensor([14, 9, 11])[:, None]).long()
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, :3] = IGNORED
    return Batch(ids, labels, mask, None, [0, 1, 2], int((labels[:, 1:] != IGNORED).sum()))


def packed(seed: int = 2) -> Batch:
    ids = torch.randint(3, 48, (1, 30), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(n) for n in (13, 1, 16)])[None]
    labels = ids.masked_fill(positions < 2, IGNORED)
    return Batch(ids, labels, None, positions, [0, 1, 2], int((labels[:, 1:] != IGNORED).sum()))


def results(model: Any, batch: Batch, seed: int = 0) -> dict[str, torch.Tensor]:
    """The losses, and the gradient of each tensor of the adapter."""
    model.zero_grad()
    torch.manual_seed(seed)
    losses, rows = token_losses(model, batch)
    losses.mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"losses": losses.detach(), "rows": rows, **grads}


def adapted(make: Callable[[], Any], dropout: float = 0.0) -> Any:
    model = get_peft_model(make(), LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout))
    perturb(model)
    return model


@pytest.mark.parametrize("batch", [padded(), packed()], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_model(kind, batch, monkeypatch):
    make, parts = KINDS[kind]
    model = adapted(make).train()
    monkeypatch.setenv("SMIDGEN_KERNELS", "reference")
    kernels.forget()
    expected = results(model, batch)
    monkeypatch.delenv("SMIDGEN_KERNELS")
    kernels.forget()
    classes, said = [type(module) for module in model.modules()], []
    with fused(model, say=said.append):
        found = results(model, batch)
        checkpointed = None
        if kind == "llama":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            checkpointed = results(model, batch)
            model.gradient_checkpointing_disable()
    assert parts in said[0]
    assert [type(module) for module in model.modules()] == classes
    assert found.keys() == expected.keys() and torch.equal(found["rows"], expected["rows"])
    for others in filter(None, (found, checkpointed)):
        for name, tensor in expected.items():
            difference = (others[name] - tensor).float().norm() / tensor.float().norm().clamp_min(1e-6)
            assert difference < 1e-4, (name, difference)


def test_bfloat16_is_as_near_to_float32_as_the_model_itself(monkeypatch):
    exact, model = adapted(tiny_llama).train(), adapted(tiny_llama).train()
    for name, parameter in model.named_parameters():
        if "adapters" not in name:
            parameter.data = parameter.data.bfloat16()
    batches = [packed(seed) for seed in range(12)]

    def error() -> float:
        """Of all gradients of all batches, relative to the whole."""
        squares = torch.zeros(2)
        for batch, truth in zip(batches, truths, strict=True):
            found = results(model, batch)
            for name in truth.keys() - {"losses", "rows"}:
                squares += torch.stack([(found[name] - truth[name]).square().sum(), truth[name].square().sum()])
        return (squares[0] / squares[1]).sqrt().item()

    monkeypatch.setenv("SMIDGEN_KERNELS", "reference")
    kernels.forget()
    truths = [results(exact, batch) for batch in batches]
    plain = error()
    monkeypatch.delenv("SMIDGEN_KERNELS")
    kernels.forget()
    with fused(model, say=lambda line: None):
        assert error() < 1.05 * plain


def apart(monkeypatch) -> None:
    """Without whole blocks."""
    monkeypatch.setattr(fuse, "_take_over_blocks", lambda model: 0)


BLOCKS = {
    "all": {"target_modules": "all-linear"},
    "first products": {"target_modules": ["k_proj", "up_proj"]},
    "last product of one layer": {"target_modules": ["down_proj"], "layers_to_transform": [1]},
    "ranks": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 40, "up_proj": 3}, "use_rslora": True},
    "DoRA, which is more than a product": {"target_modules": ["q_proj"], "use_dora": True},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_whole_blocks_drop_and_learn_as_their_parts_do(name, monkeypatch):
    def run(model: Any) -> dict[str, torch.Tensor]:
        with fused(model, say=lambda line: None):
            return results(model, padded())

    def make() -> Any:
        model = get_peft_model(tiny_llama(bias=True), LoraConfig(r=4, lora_dropout=0.2, **BLOCKS[name]))
        perturb(model)
        return model.train()

    whole = run(make())
    apart(monkeypatch)
    parts = run(make())
    assert whole.keys() == parts.keys()
    for key, tensor in parts.items():
        torch.testing.assert_close(whole[key], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_whole_blocks_learn_every_weight():
    model, other = tiny_llama(bias=True).train(), tiny_llama(bias=True).train()
    expected = results(other, packed())
    with fused(model, say=lambda line: None):
        found = results(model, packed())
    assert found.keys() == expected.keys() and len(found) == 2 + len(list(model.parameters()))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


def test_autocast_is_as_near_to_float32_as_the_model_itself():
    model = tiny_llama(bias=True).train()
    perturb(model, scale=0.05)
    batches = [packed(seed) for seed in range(6)]
    truths = [results(model, batch) for batch in batches]

    def error() -> float:
        squares = torch.zeros(2)
        with torch.autocast("cpu", torch.bfloat16):
            for batch, truth in zip(batches, truths, strict=True):
                for name, tensor in results(model, batch).items():
                    assert tensor.dtype == truth[name].dtype
                    squares += torch.stack([(tensor - truth[name]).square().sum(), truth[name].square().sum()])
        return (squares[0] / squares[1]).sqrt().item()

    plain = error()
    with fused(model, say=lambda line: None):
        assert error() < 1.25 * plain  # the sums of the residual stream are rounded too


def test_frozen_products_are_joined_and_parted():
    model = adapted(tiny_llama)
    attention = model.get_submodule("model.layers.0.self_attn")
    weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    before = [(weight.clone(), weight.untyped_storage().nbytes()) for weight in weights]
    with fused(model, say=lambda line: None):
        assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
        inside = results(model, padded())
        with torch.no_grad():  # another weight in the place of a joined one is seen
            attention.k_proj.weight.data = attention.k_proj.weight * 2
        assert not torch.equal(results(model, padded())["losses"], inside["losses"])
    assert weights == [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert [weight.untyped_storage().nbytes() for weight in weights] == [size for _, size in before]
    assert torch.equal(weights[0], before[0][0]) and torch.equal(weights[1], before[1][0] * 2)


def test_another_bias_in_the_place_of_a_joined_one_is_seen():
    model = adapted(lambda: tiny_llama(bias=True))
    module = model.get_submodule("model.layers.0.self_attn.v_proj")
    with fused(model, say=lambda line: None):
        before = results(model, padded())["losses"]
        module.bias.data = module.bias + 1
        assert not torch.allclose(results(model, padded())["losses"], before)


def test_a_hook_inside_a_block_is_served_by_the_layer_itself():
    model, heard = adapted(tiny_llama), []
    with fused(model, say=lambda line: None):
        expected = results(model, padded())
        hook = model.get_submodule("model.layers.1.mlp.up_proj").register_forward_hook(lambda *call: heard.append(call))
        found = results(model, padded())
        hook.remove()
    assert len(heard) == 1
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


def test_adapters_that_come_and_go_inside():
    model = adapted(tiny_llama)
    with model.disable_adapter():
        base, _ = token_losses(model, padded())
    with fused(model, say=lambda line: None):
        with model.disable_adapter():
            torch.testing.assert_close(token_losses(model, padded())[0], base)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
        model.set_adapter("second")
        perturb(model)
        inside = token_losses(model, padded())[0]
    torch.testing.assert_close(token_losses(model, padded())[0], inside)


def test_dropout_follows_from_the_seed_and_the_recomputation_draws_the_same():
    model = adapted(tiny_llama, dropout=0.3).train()
    with fused(model, say=lambda line: None):
        one, again, other = (results(model, padded(), seed) for seed in (1, 1, 2))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        checkpointed = results(model, padded(), 1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["losses"], other["losses"])
    for name, tensor in one.items():
        assert torch.equal(checkpointed[name], tensor), name


def test_what_the_kernels_do_not_reproduce_stays(monkeypatch):
    model, said = adapted(tiny_llama), []
    monkeypatch.setattr(kernels, "rms_norm", lambda x, *how: x * 1.01)
    with fused(model, say=said.append):
        assert "norms" not in said[0] and "2 feed-forward layers" in said[0]


def test_attention_that_drops_weights_stays_the_models_own():
    said: list[str] = []
    model = of_kind("Llama", attention_dropout=0.1)()
    with fused(model, say=said.append):
        assert model.config._attn_implementation == "sdpa"
    assert "attention stays the model's own: it drops weights of the attention (attention_dropout)" in said


def test_generating_inside_is_generating_outside():
    model, prompt = adapted(tiny_llama), torch.tensor([[1, 5, 9, 11]])
    outside = model.generate(prompt, max_new_tokens=8, do_sample=False)
    with fused(model, say=lambda line: None):
        assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), outside)


def test_plain_pytorch_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("SMIDGEN_KERNELS", "reference")
    kernels.forget()
    said: list[str] = []
    model = adapted(tiny_llama)
    with fused(model, say=said.append):
        assert model.config._attn_implementation == "sdpa"
    assert said[0].startswith("kernels: reference")
    monkeypatch.undo()
    kernels.forget()


# ---- in a loop of one's own ----


def peft_model() -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(tiny_llama(), config)


MADE: dict[str, Callable[[], Any]] = {
    "plain": tiny_llama,
    "peft": peft_model,
    "smidgen": lambda: adapted(tiny_llama),
    "decoder": lambda: tiny_llama().model,
}


def answers(model: Any) -> list[torch.Tensor]:
    """The answer to padded rows where there is no padding, and the gradients of a random sum of it."""
    batch = padded()
    assert batch.attention_mask is not None
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    answer = out[0][batch.attention_mask.bool()]
    model.zero_grad()
    (answer * torch.randn(answer.shape, generator=torch.Generator().manual_seed(0))).mean().backward()
    return [answer.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", MADE)
def test_any_model_may_be_fused_for_good(name):
    model, said = MADE[name](), []
    expected, classes = answers(model), [type(module) for module in model.modules()]
    for _ in range(2):  # the second time it is as the first
        smidgen.fuse(model, say=said.append)
        assert "5 norms, 2 feed-forward layers, attention" in said[-1]
        assert ("2 whole blocks" in said[-1]) == (name != "peft")  # whose layers are called one by one
    for found, tensor in zip(answers(model), expected, strict=True):
        assert (found - tensor).norm() < 1e-4 * tensor.norm()
    smidgen.unfuse(model)
    assert [type(module) for module in model.modules()] == classes
    assert all(map(torch.equal, answers(model), expected))


def test_a_copy_is_fused_and_undone_on_its_own():
    model: Any = tiny_llama()
    smidgen.fuse(model, say=lambda line: None)
    other = copy.deepcopy(model)
    smidgen.unfuse(model)
    assert model.config._attn_implementation == "sdpa" != other.config._attn_implementation
    assert isinstance(other.model.norm, FusedModule) and not isinstance(model.model.norm, FusedModule)
    assert torch.allclose(answers(model)[0], answers(other)[0], atol=1e-5)


@pytest.mark.parametrize("trained", [True, False])
def test_what_is_saved_does_not_tell_of_kernels(trained, tmp_path):
    model: Any = tiny_llama().requires_grad_(trained)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    smidgen.fuse(model, say=lambda line: None)
    model.save_pretrained(tmp_path)
    assert all(b"smidgen" not in file.read_bytes() for file in tmp_path.iterdir())
    saved = transformers.LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)


def test_a_fused_model_may_change_and_answer_in_another_thread():
    model: Any = tiny_llama()
    smidgen.fuse(model, say=lambda line: None)
    model.resize_token_embeddings(50)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", modules_to_save=["norm", "lm_head"]))
    perturb(model)
    found: dict[str, torch.Tensor] = {}
    thread = threading.Thread(target=lambda: found.update(results(model, padded())))
    thread.start()
    thread.join()
    smidgen.unfuse(model)
    expected = results(model, padded())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).float().norm() <= 1e-4 * tensor.float().norm(), name


def test_there_must_be_a_model():
    with pytest.raises(UsageError, match="no model of transformers in this Linear"):
        smidgen.fuse(torch.nn.Linear(2, 2))


@pytest.mark.slow
def test_trainer_learns_the_same(tmp_path):
    rows: Any = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 48, (8, 12)).tolist()]
    losses = []
    for fuses in (False, True):
        model = peft_model()
        if fuses:
            smidgen.fuse(model, say=lambda line: None)
        options = {"max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-2}
        arguments = transformers.TrainingArguments(
            str(tmp_path), report_to=[], save_strategy="no", use_cpu=True, **options
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-3)
