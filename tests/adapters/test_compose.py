"""Compositions against the same computed by hand, with hooks on the plain model, in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import smidgen
from smidgen import Average, Fuse, Parallel, Stack
from smidgen.adapters.attach import adapters_of, penalties
from smidgen.errors import AdapterFileError, MergeError, TargetError, UsageError
from tests.conftest import logits, perturb, tiny_bert, tiny_llama, tokens, toy

VO = ["v_proj", "o_proj"]
KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "pfeiffer": (tiny_llama, lambda: smidgen.BottleneckConfig(kind="pfeiffer", reduction_factor=4)),
    "houlsby": (tiny_llama, lambda: smidgen.BottleneckConfig(kind="houlsby", reduction_factor=4)),
    "parallel": (tiny_llama, lambda: smidgen.BottleneckConfig(kind="parallel", reduction_factor=4)),
    "BERT pfeiffer": (tiny_bert, lambda: smidgen.BottleneckConfig(kind="pfeiffer", reduction_factor=4)),
    "lora": (tiny_llama, lambda: smidgen.LoraConfig(r=4, target_modules=VO)),
}
SHARES = [0.25, 0.75]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def two(kind: str) -> Any:
    """A model with the adapters "a" and "b", in float64."""
    build, config = KINDS[kind]
    torch.manual_seed(1)
    model = smidgen.get_peft_model(build(), config(), "a").eval()
    model.add_adapter("b", config())
    model.set_adapter(["a", "b"])
    perturb(model)
    return model.double()


def by_hand(kind: str, model: Any, combine: Callable[..., Tensor]) -> Tensor:
    """The logits of the plain model with ``combine(path, read, updates)`` added to each adapted layer's answer.

    ``updates(y)`` answers what A reads where the layer answers y, and what a and b then add.
    """
    plain = KINDS[kind][0]().double()
    met: dict[str, Tensor] = {}
    norms = {path.removesuffix(".output.LayerNorm"): module for path, module in plain.named_modules()}
    for path, first in adapters_of(model, "a"):
        parts = [first, dict(adapters_of(model, "b"))[path]]
        block = ".".join(path.split(".")[: 4 if "bert" in path else 3])
        layer = plain.get_submodule(path)
        if not hasattr(first, "adapter_up") and not hasattr(first, "lora_A"):
            layer.register_forward_pre_hook(lambda m, args, block=block: met.update({block: args[0]}))
            continue

        def hook(
            m: nn.Module, args: Any, y: Tensor, path: Any = path, parts: Any = parts, block: Any = block
        ) -> Tensor:
            def updates(y: Tensor, x: Tensor = args[0]) -> tuple[Tensor, list[Tensor]]:
                if kind == "lora":
                    return y, [2.0 * x @ part.lora_A.weight.T @ part.lora_B.weight.T for part in parts]
                read = y if kind == "houlsby" else met[block] if kind == "parallel" else met[block] + y
                read = norms[block](read) if kind == "BERT pfeiffer" else read
                scale = 4.0 if kind == "parallel" else 1.0
                return read, [scale * part.adapter_up(part.adapter_down(read)) for part in parts]

            return y + combine(path, y, updates)

        layer.register_forward_hook(hook)
    return logits(plain, tokens())


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


def test_a_stack_is_one_after_the_other(kind: str) -> None:
    model = two(kind)

    def both(path: str, y: Tensor, updates: Any) -> Tensor:
        first = updates(y)[1][0]
        return first + updates(y + first)[1][1]

    model.compose(Stack("a", "b"))
    assert model.active_adapters == ["a", "b"]
    near(logits(model, tokens()), by_hand(kind, model, both))
    composed = logits(model, tokens())
    model.set_adapter(["a", "b"])
    assert torch.equal(logits(model, tokens()), composed)


def test_an_average_is_the_mean_of_the_outputs(kind: str) -> None:
    model = two(kind)

    def mean(path: str, y: Tensor, updates: Any) -> Tensor:
        first, second = updates(y)[1]
        return 0.25 * first + 0.75 * second

    model.compose(Average("a", "b", weights=[1, 3]))
    near(logits(model, tokens()), by_hand(kind, model, mean))
    with pytest.raises(MergeError, match="a composition answers now"):
        model.merge_adapter()


def test_an_average_of_lora_equals_the_weighted_adapter() -> None:
    model = two("lora")
    model.add_weighted_adapter(["a", "b"], SHARES, "c", combination_type="cat")
    model.set_adapter("c")
    expected = logits(model.double(), tokens())
    model.compose(Average("a", "b", weights=SHARES))
    torch.testing.assert_close(logits(model, tokens()), expected, atol=1e-5, rtol=1e-5)  # c was made in float32


def test_what_reads_the_weight_stands_above_an_average() -> None:
    model = two("lora")
    model.add_adapter("dora", smidgen.LoraConfig(target_modules=VO, use_dora=True))
    model.set_adapter("dora")
    perturb(model)
    model.add_weighted_adapter(["a", "b"], SHARES, "c", combination_type="cat")
    model.double().set_adapter(["c", "dora"])
    expected = logits(model, tokens())
    model.compose(Stack(Average("a", "b", weights=SHARES), "dora"))
    torch.testing.assert_close(logits(model, tokens()), expected, atol=1e-5, rtol=1e-5)  # c was made in float32


def test_parallel_answers_the_rows_for_each_part(kind: str) -> None:
    model = two(kind)
    expected = []
    for part in ("a", "b", Average("a", "b"), Stack("b", "a")):
        model.compose(Stack(part))
        expected.append(logits(model, tokens()))
    model.compose(Parallel("a", "b", Average("a", "b"), Stack("b", "a")))
    near(logits(model, tokens()), torch.cat(expected))
    labelled = model(tokens(), labels=tokens() % 5)
    assert labelled.logits.shape[0] == 12 and torch.isfinite(labelled.loss)
    rows = ["a", Average("a", "b"), "__base__"]
    together = model(tokens(), adapter_names=rows).logits
    near(together[:2], torch.stack([expected[0][0], expected[2][1]]))
    with model.disable_adapter():
        near(together[2:], logits(model, tokens())[2:])
        assert logits(model, tokens()).shape[0] == 3


def test_parallel_generates_for_each_part_prompts_too() -> None:
    model = two("lora").float()
    model.add_adapter("prompt", smidgen.PromptTuningConfig(num_virtual_tokens=3))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["attention_mask"] = torch.tensor([[0, 0] + [1] * 10, [1] * 12, [0] * 5 + [1] * 7])
    expected = []
    for part in ("a", "prompt", Stack("prompt", "b")):
        model.compose(Stack(part))
        expected.append(model.generate(tokens(), **options))
    model.compose(Parallel("a", "prompt", Stack("prompt", "b")))
    assert torch.equal(model.generate(tokens(), **options), torch.cat(expected))


# ---- fusion ----


def attention(fusion: Any, read: Tensor, updates: list[Tensor]) -> Tensor:
    """adapter-hub's BertFusion before its residual, as its sources have it, with updates for keys and values."""
    stacked = torch.stack(updates).permute(1, 2, 0, 3)
    scores = torch.squeeze(torch.matmul(fusion.query(read).unsqueeze(2), fusion.key(stacked).transpose(-2, -1)), dim=2)
    shares = torch.softmax(scores, dim=-1)
    return torch.squeeze(torch.matmul(shares.unsqueeze(2), fusion.value(stacked)), dim=2)


def fused(kind: str) -> Any:
    model = two(kind)
    model.compose(Fuse("a", "b"))
    perturb(model.double(), seed=3, scale=0.2)
    return model


def test_a_fusion_is_adapter_hubs(kind: str) -> None:
    model = fused(kind)
    fusions = dict(adapters_of(model, "a,b"))
    expected = by_hand(kind, model, lambda path, y, updates: attention(fusions[path], *updates(y)))
    torch.testing.assert_close(logits(model, tokens()), expected, atol=1e-6, rtol=1e-6)  # its softmax is in float32


def test_a_fusion_starts_and_is_held_as_adapter_hubs() -> None:
    model = two("pfeiffer")
    model.compose(Fuse("a", "b"))
    values = [fusion.value.weight for _, fusion in adapters_of(model, "a,b") if fusion.names]
    for value in values:
        torch.testing.assert_close(value, torch.full((32, 32), 1e-6).fill_diagonal_(1.0))
    perturb(model)
    expected = sum(0.01 * (torch.eye(32) - value).pow(2).sum() for value in values)
    torch.testing.assert_close(sum(penalties(model)), expected)
    model.set_adapter("a")
    assert penalties(model) == []


def test_a_fusion_of_one_with_an_identity_is_that_one(kind: str) -> None:
    model = two(kind)
    model.set_adapter("a")
    expected = logits(model, tokens())
    model.add_adapter("only", smidgen.FusionConfig(adapters=["a"]))
    model.double().set_adapter("only")
    with torch.no_grad():
        for _, fusion in adapters_of(model, "only"):
            if fusion.names:
                fusion.value.weight.copy_(torch.eye(len(fusion.value.weight)))
    near(logits(model, tokens()), expected)


def test_only_the_fusion_learns(kind: str) -> None:
    model = fused(kind)
    (logits(model, tokens()).square().mean() + sum(penalties(model))).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {name for name, p in model.named_parameters() if ".adapters.a,b." in name}
    assert moved and all(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_a_fusion_is_saved_with_what_it_fuses(kind: str, tmp_path: Path) -> None:
    model = fused(kind).float()
    model.save_pretrained(tmp_path, selected_adapters=["a,b"])
    folder = tmp_path / "a,b"
    loaded = smidgen.PeftModel.from_pretrained(KINDS[kind][0](), folder)
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))
    assert loaded.active_adapters == ["default"] and loaded.peft_config["default"].adapters == ["a", "b"]
    with pytest.raises(UsageError, match="'a' is one of those that 'default' fuses; delete that first"):
        loaded.delete_adapter("a")
    loaded.load_adapter(folder, "again")  # beside adapters of the same names
    assert loaded.peft_config["again"].adapters == ["a-2", "b-2"]
    loaded.set_adapter("again")
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


def test_keys_are_adapter_hubs(tmp_path: Path) -> None:
    expected = {
        "pfeiffer": "model.layers.1.output_adapters.adapter_fusion_layer.a,b.query.weight",
        "houlsby": "model.layers.1.attention_adapters.adapter_fusion_layer.a,b.value.weight",
        "BERT pfeiffer": "bert.encoder.layer.1.output.adapter_fusion_layer.a,b.key.bias",
    }
    for kind, key in expected.items():
        fused(kind).save_pretrained(tmp_path / kind)
        weights = tmp_path / kind / "a,b" / "adapter_model.safetensors"
        tensors = load_file(weights)
        assert key in tensors and len(tensors) == (20 if kind == "houlsby" else 10)
    renamed = {key.replace(".a,b.", ".mnli,sst.") for key in tensors}
    save_file(dict(zip(sorted(renamed), (tensors[key] for key in sorted(tensors)), strict=True)), weights)
    smidgen.PeftModel.from_pretrained(tiny_bert(), weights.parent)


def test_what_cannot_be_composed_is_refused_and_changes_nothing() -> None:
    model = two("lora")
    model.add_adapter("prompt", smidgen.PromptTuningConfig(num_virtual_tokens=3))
    model.add_adapter("head", smidgen.LoraConfig(target_modules=["lm_head"], modules_to_save=["norm"]))
    before, there = logits(model, tokens()), list(model.peft_config)
    for make, words in {
        lambda: Stack("a", Parallel("b", "prompt")): r"stands in none: write Parallel\(Stack\('a', 'b'\)",
        lambda: Average("a", "prompt"): "'prompt' stands before the rows of the whole model; an average is of what",
        lambda: Fuse("a", "prompt"): "'prompt' at the whole model: stands before the rows of the whole model",
        lambda: Fuse("a", "head"): "'head' at model.norm: a TrainedCopy stands in place of something",
        lambda: Stack("a", Average("a", "b")): "Stack: 'a' stands in it twice",
        lambda: Stack("a", "c"): "adapter: no 'c'",
        lambda: Fuse("a", "c"): "adapter: no 'c'",
        lambda: Average("a", "b", weights=[1, -1]): "weights: needs one for each of 2 parts, and a sum",
        lambda: Average("a", "b", weights=[1]): "weights: needs one for each of 2 parts",
        lambda: Stack(): "Stack: takes names of adapters and compositions",
        lambda: Fuse("a", Stack("b")): "takes two names of adapters or more",  # type: ignore[arg-type]
    }.items():
        with pytest.raises(UsageError, match=words):
            model.compose(make())
        assert list(model.peft_config) == there and torch.equal(logits(model, tokens()), before)
    model.compose(Parallel("a", "b"))
    with pytest.raises(UsageError, match="Parallel: is answered by a call of the model itself"):
        model.model(tokens())
    model.set_adapter("a")
    assert logits(model, tokens()).shape[0] == 3
    with pytest.raises(UsageError, match="adapters: needs folders or names of adapters, each once"):
        smidgen.FusionConfig(adapters=["a", "a"])
    plain = smidgen.get_peft_model(toy(), smidgen.LoraConfig(target_modules=["conv1"]), "a")
    with pytest.raises(TargetError, match="'a' at conv1: the outputs of a Conv1d cannot be fused"):
        plain.add_adapter("fusion", smidgen.FusionConfig(adapters=["a"]))


def test_folders_that_cannot_be_fused_are_refused_and_leave_the_model_plain(tmp_path: Path) -> None:
    model = fused("pfeiffer").float()
    model.save_pretrained(tmp_path)
    folder, plain = tmp_path / "a,b", tiny_llama()
    with pytest.raises(AdapterFileError, match="is a fusion itself; name the adapters that it fuses"):
        smidgen.get_peft_model(plain, smidgen.FusionConfig(adapters=[str(tmp_path / "a"), str(folder)]))
    assert type(plain) is type(tiny_llama())
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"a"', '"../a"'))
    with pytest.raises(AdapterFileError, match="must name a file in this folder"):
        smidgen.PeftModel.from_pretrained(plain, folder)
    assert type(plain) is type(tiny_llama())


def test_a_module_that_holds_the_cache_is_refused_row_by_row() -> None:
    model = two("lora").float()
    model.add_adapter("whole", smidgen.LoraConfig(target_modules=["up_proj"], modules_to_save=["self_attn"]))
    model.set_adapter("whole")
    perturb(model)
    names = ["whole", "a", "__base__"]
    with pytest.raises(UsageError, match=r"would fill the cache.*call the model with use_cache=False"):
        model(tokens(), adapter_names=names)
    answer = model(tokens(), adapter_names=names, use_cache=False, position_ids=torch.arange(12).expand(3, 12)).logits
    for row, name in enumerate(names[:2]):
        model.set_adapter(name)
        torch.testing.assert_close(answer[row], logits(model, tokens()[row : row + 1])[0], atol=1e-5, rtol=1e-5)
