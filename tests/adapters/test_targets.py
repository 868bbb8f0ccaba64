"""Every requested name must match; what is wrong is told with the real names, and nothing is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import smidgen
from smidgen.adapters.targets import count_names, find_targets
from smidgen.errors import TargetError, UsageError
from tests.conftest import tiny_gpt2, tiny_llama, toy


def wrong(model: nn.Module, **options: Any) -> str:
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises((TargetError, UsageError)) as caught:
        smidgen.get_peft_model(model, smidgen.LoraConfig(**options))
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    return str(caught.value)


def targets(model: nn.Module, **options: Any) -> dict[str, int]:
    return count_names(find_targets(model, smidgen.LoraConfig(**options)))


def test_a_name_that_matches_nothing_lists_the_real_ones_and_the_nearest() -> None:
    message = wrong(tiny_gpt2(), target_modules=["q_proj", "c_attn"])
    assert message == (
        "target_modules: 'q_proj' matches 0 modules; did you mean 'c_proj'? Available linear layers: "
        "c_proj x4, c_attn x2, c_fc x2, lm_head x1; other layers: wte x1, wpe x1."
    )
    assert "'c_attm' matches 0 modules; did you mean 'c_attn'?" in wrong(tiny_gpt2(), target_modules=["c_attm"])


def test_all_mistakes_are_told_at_once() -> None:
    message = wrong(tiny_llama(), target_modules=["wq", "wv"], layers_to_transform=[7])
    assert "'wq'" in message and "'wv'" in message and "layers_to_transform: no layer 7" in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": "q_porj"}, "'q_porj' matches 0 modules"),
        ({"target_modules": "(q"}, "is not a regular expression"),
        ({"target_modules": ["mlp"]}, "is a LlamaMLP; name the layers in it"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "exclude_modules leaves none"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["k_proj"]}, "'k_proj' matches none of the target modules"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["scores"]}, "modules_to_save: 'scores' matches 0 modules"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 4}}, "rank_pattern: 'v_proj' matches none"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"(": 4}}, "is not a regular expression"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [5]},
            "no layer 5 holds a target; there are layers 0 to 1",
        ),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "give target_modules a list"),
        ({"target_modules": ["q_proj"], "layers_pattern": "layers"}, "only together with layers_to_transform"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [99]}, "the vocabulary has 48 rows"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "orthogonal", "r": 3}, "orthogonal needs an even r"),
        ({"target_modules": ["embed_tokens"], "lora_bias": True}, "an embedding has no bias"),
    ],
)
def test_what_cannot_be_done_is_told_before_anything_changes(options: dict[str, Any], said: str) -> None:
    assert said in wrong(tiny_llama(), **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 0}, "r: must be a whole number from 1 to 65536, got 0"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern['q']: must be a whole number"),
        ({"lora_dropout": 1.0}, "lora_dropout: must be from 0 to below 1"),
        ({"bias": "some"}, "bias: must be"),
        ({"init_lora_weights": "pisa"}, "init_lora_weights: no 'pisa'; did you mean 'pissa'?"),
    ],
)
def test_bad_values_are_refused_by_the_configuration(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        smidgen.LoraConfig(**options)
    assert said in str(caught.value)


def test_default_is_every_linear_layer_but_the_head() -> None:
    linear = {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2, "gate_proj": 2, "up_proj": 2, "down_proj": 2}
    assert targets(tiny_llama()) == linear == targets(tiny_llama(), target_modules="all-linear")
    assert targets(tiny_gpt2()) == {"c_proj": 4, "c_attn": 2, "c_fc": 2}


def test_layers_and_exclusions() -> None:
    assert targets(tiny_llama(), target_modules=["q_proj"], layers_to_transform=1) == {"q_proj": 1}
    assert targets(tiny_llama(), target_modules="all-linear", exclude_modules=r".*mlp.*")["q_proj"] == 2
    assert "up_proj" not in targets(tiny_llama(), exclude_modules=r".*mlp.*")
    assert find_targets(toy(), smidgen.LoraConfig(target_modules=["linear", "head"])) == ["linear", "head"]


def test_targets_inside_a_trained_copy_are_left_to_the_copy() -> None:
    assert "up_proj" not in targets(tiny_llama(), modules_to_save=["mlp"])


def test_a_weight_that_its_parent_reads_is_not_adapted() -> None:
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "linear": nn.Linear(8, 8)})
    assert targets(attention) == {"linear": 1}
    assert "never called" in wrong(attention, target_modules=["out_proj"])


def test_a_second_adapter_does_not_see_the_first() -> None:
    model = smidgen.get_peft_model(tiny_llama(), smidgen.LoraConfig(target_modules="all-linear"))
    before = targets(model)
    model.add_adapter("second", smidgen.LoraConfig(target_modules="all-linear"))
    assert targets(model) == before == targets(tiny_llama())


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "keys", "__base__"])
def test_names_that_cannot_be_parameters_names(name: str) -> None:
    with pytest.raises(UsageError, match="adapter_name"):
        smidgen.get_peft_model(tiny_llama(), smidgen.LoraConfig(), adapter_name=name)


def test_taken_name() -> None:
    model = smidgen.get_peft_model(tiny_llama(), smidgen.LoraConfig())
    with pytest.raises(UsageError, match="there is an adapter 'default' already"):
        model.add_adapter("default", smidgen.LoraConfig())


def test_heads_of_tasks_are_trained_and_saved(tmp_path: Any) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    def classifier() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        return LlamaForSequenceClassification(LlamaConfig(**sizes, vocab_size=48, num_labels=3, pad_token_id=0)).eval()

    model = smidgen.get_peft_model(classifier(), smidgen.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    ids = torch.randint(3, 48, (2, 7))
    before = model(ids).logits
    trained = [p for name, p in model.named_parameters() if "score.adapters" in name]
    assert [p.shape for p in trained] == [(3, 32)] and trained[0].requires_grad
    trained[0].data.add_(1.0)
    model.save_pretrained(tmp_path)
    loaded = smidgen.PeftModel.from_pretrained(classifier(), tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not torch.equal(loaded(ids).logits, before)
