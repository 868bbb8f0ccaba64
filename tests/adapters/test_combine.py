"""Weighted combinations of LoRA adapters: equal to peft's for every type, and to closed formulas."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import smidgen
from smidgen.adapters.attach import adapters_of, fold_in_float32
from smidgen.adapters.combine import COMBINATIONS, Combination
from smidgen.errors import UsageError
from tests.conftest import logits, perturb, tiny_gpt2, tiny_llama, tokens, toy
from tests.laws.cases import QV, tied

# model: what its two adapters adapt; one layer both, others one of them.
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str], list[str]]] = {
    "llama": (tiny_llama, ["q_proj", "up_proj"], ["q_proj", "down_proj"]),
    "Conv1D": (tiny_gpt2, ["c_attn"], ["c_attn", "c_fc"]),
    "kinds": (toy, ["embed", "linear", "conv2"], ["conv2", "embed"]),
}
WEIGHTS = [0.7, -1.3]


def options(kind: str) -> dict[str, Any]:
    return {} if kind in ("svd", "cat", "linear") else {"density": 0.4}


def pair(model: str, r: tuple[int, int], folder: Path) -> tuple[Any, Any]:
    """The same two adapters "one" and "two" on a model of peft's and on one of ours."""
    build, first, second = MODELS[model]
    more: dict[str, Any] = {"fan_in_fan_out": model == "Conv1D"}
    theirs = peft.get_peft_model(
        build(), peft.LoraConfig(r=r[0], lora_alpha=6, target_modules=first, **more), adapter_name="one"
    )
    other = peft.LoraConfig(r=r[1], lora_alpha=3, target_modules=second, use_rslora=True, **more)
    theirs.add_adapter("two", other)
    for seed, name in ((5, "one"), (6, "two")):
        theirs.set_adapter(name)
        perturb(theirs, seed, scale=0.3)
    theirs.save_pretrained(str(folder))
    ours = smidgen.PeftModel.from_pretrained(build(), folder / "one", adapter_name="one")
    ours.load_adapter(folder / "two", "two")
    return theirs.eval(), ours.eval()


@pytest.fixture
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft draws numbers for the new adapter first: what is drawn after that starts from the same seed as here."""
    inject = peft.tuners.lora.LoraModel.inject_adapter

    def then_seed(*args: Any, **kwargs: Any) -> None:
        inject(*args, **kwargs)
        torch.manual_seed(7)

    monkeypatch.setattr(peft.tuners.lora.LoraModel, "inject_adapter", then_seed)


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", COMBINATIONS)
def test_equals_pefts(kind: str, model: str, sign: str, tmp_path: Path) -> None:
    if sign == "frequency" and "ties" not in kind:
        pytest.skip("no vote is taken")
    free = kind == "cat" or kind.endswith("svd")
    theirs, ours = pair(model, (4, 3) if free else (4, 4), tmp_path)
    asked = {"combination_type": kind, "majority_sign_method": sign} | options(kind)
    torch.manual_seed(7)
    ours.add_weighted_adapter(["one", "two"], WEIGHTS, "mix", **asked)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(7)
        theirs.add_weighted_adapter(["one", "two"], WEIGHTS, "mix", **asked)
    theirs.set_adapter("mix")
    one, base = logits(ours, tokens()), logits(MODELS[model][0](), tokens())
    ours.set_adapter("mix")
    expected = logits(theirs, tokens())
    assert min((expected - other).abs().max() for other in (one, base)) > 1e-2
    torch.testing.assert_close(logits(ours, tokens()), expected, atol=2e-5, rtol=1e-5)
    # And in a file.
    ours.save_pretrained(tmp_path / "ours", selected_adapters=["mix"])
    again = peft.PeftModel.from_pretrained(MODELS[model][0](), str(tmp_path / "ours" / "mix")).eval()
    torch.testing.assert_close(logits(again, tokens()), expected, atol=2e-5, rtol=1e-5)


def update_of(model: Any, path: str, name: str) -> Tensor:
    """merge(W) - W of one adapter at one layer."""
    module = model.get_submodule(path)
    both = (fold_in_float32(module, names)["weight"].double() for names in ([name], []))
    return next(both) - next(both)


def two(model: nn.Module, **options: Any) -> Any:
    """A model with two unlike adapters of the same options."""
    adapted: Any = smidgen.get_peft_model(model, smidgen.LoraConfig(r=4, **options), adapter_name="one")
    adapted.add_adapter("two", smidgen.LoraConfig(r=6, lora_alpha=3, **options))
    adapted.set_adapter(["one", "two"])
    perturb(adapted)
    return adapted.eval()


@pytest.mark.parametrize(
    "more", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}}], ids=["plain", "rslora", "ranks"]
)
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_a_sum_of_updates_is_their_sum(kind: str, more: dict[str, Any]) -> None:
    model = two(tiny_llama(), target_modules=QV, **more)
    rank = {"svd_rank": 10} if kind == "svd" else {}
    model.add_weighted_adapter(["one", "two"], [2.0, -0.5], "mix", combination_type=kind, **rank)
    for path, _ in adapters_of(model, "mix"):
        expected = 2.0 * update_of(model, path, "one") - 0.5 * update_of(model, path, "two")
        torch.testing.assert_close(update_of(model, path, "mix"), expected, atol=1e-5, rtol=0)
    assert [name for name, p in model.named_parameters() if p.requires_grad and "mix" in name] == []


def test_equal_patterns_of_ranks_add_up() -> None:
    model = two(tiny_llama(), target_modules=QV)
    model.add_adapter("three", smidgen.LoraConfig(r=6, target_modules=QV, rank_pattern={"v_proj": 2}))
    model.add_adapter("four", smidgen.LoraConfig(r=6, target_modules=QV, rank_pattern={"v_proj": 2}))
    model.add_weighted_adapter(["three", "four"], [1.0, 1.0], "mix", combination_type="linear")
    assert {adapter.r for _, adapter in adapters_of(model, "mix")} == {6}  # pyright: ignore[reportAttributeAccessIssue]


def test_tied_layers_stay_tied() -> None:
    model = two(tied(), target_modules=["embed_tokens"], ensure_weight_tying=True)
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "mix", combination_type="cat")
    stacked = logits(model, tokens())
    model.set_adapter("mix")
    torch.testing.assert_close(logits(model, tokens()), stacked, atol=1e-4, rtol=1e-4)


def test_closed_formulas() -> None:
    one, other = torch.tensor([[4.0, -1.0, 2.0, 0.5]]), torch.tensor([[1.0, -3.0, -2.5, 0.0]])
    weights = [1.0, 2.0]
    assert torch.equal(Combination("linear").sum([one, other], weights), one + 2 * other)
    pruned = Combination("magnitude_prune", density=0.5).sum([one, other], weights)
    assert torch.equal(pruned, torch.tensor([[4.0, -6.0, 2.0 - 5.0, 0.0]]))
    # Of the third column, 2 and -2.5, the sum is negative: the second counts alone.
    assert torch.equal(
        Combination("ties", density=0.5).sum([one, other], weights), torch.tensor([[4.0, -6.0, -5.0, 0.0]])
    )
    torch.manual_seed(0)
    drawn = Combination("dare_linear", density=0.5).sum([torch.ones(10_000)], [1.0])
    assert set(drawn.unique().tolist()) == {0.0, 2.0} and abs(drawn.mean().item() - 1) < 0.05


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"combination_type": "tie"}, "combination_type: no 'tie'; did you mean 'ties'?"),
    "ranks": ({"combination_type": "linear"}, r"equal ranks; at model\.\S+q_proj 'one' has 4, 'two' has 6: take svd"),
    "no density": ({"combination_type": "ties_svd"}, "density: 'ties_svd' keeps a share .* got None"),
    "density": ({"combination_type": "dare_ties_svd", "density": 1.5}, "density: .* got 1.5"),
    "idle density": ({"density": 0.5}, "density: combination_type 'svd' prunes nothing"),
    "sign": ({"majority_sign_method": "totl"}, "majority_sign_method: no 'totl'; did you mean 'total'?"),
    "rank": ({"svd_rank": 0}, "svd_rank: must be a whole number from 1"),
    "idle rank": ({"combination_type": "cat", "svd_rank": 4}, "svd_rank: combination_type 'cat' decomposes nothing"),
    "driver": ({"svd_driver": "gesvdx"}, "svd_driver: must be one of None, gesvd"),
    "driver on CPU": ({"svd_driver": "gesvd"}, "svd_driver: only a GPU"),
    "name": ({"adapters": ["one", "tow"]}, "adapter: no 'tow'; did you mean 'two'?"),
    "none": ({"adapters": [], "weights": []}, "adapters: name at least one"),
    "weights": ({"weights": [1.0]}, "weights: 1 for 2 adapters"),
    "infinite": ({"weights": [1.0, float("inf")]}, "weights: must be finite numbers, got inf"),
    "method": ({"adapters": ["one", "oft"]}, r"adapter 'oft': oft has no factors .*\(convert_to_lora\)"),
    "DoRA": ({"adapters": ["one", "dora"]}, r"adapter 'dora': use_dora at 'model\.\S+q_proj' is more than B A"),
    "start": ({"adapters": ["one", "pissa"]}, "adapter 'pissa': init_lora_weights at"),
    "head": ({"adapters": ["one", "head"]}, r"adapter 'head': what is trained in full .* at 'lm_head'"),
    "taken": ({"adapter_name": "two"}, "there is an adapter 'two' already"),
}


@pytest.fixture(scope="module")
def crowded() -> Any:
    model = two(tiny_llama(), target_modules=QV)
    for name, config in {
        "oft": smidgen.OFTConfig(target_modules=QV, oft_block_size=8),
        "dora": smidgen.LoraConfig(target_modules=QV, use_dora=True),
        "pissa": smidgen.LoraConfig(target_modules=QV, init_lora_weights="pissa"),
        "head": smidgen.LoraConfig(target_modules=QV, modules_to_save=["lm_head"]),
    }.items():
        model.add_adapter(name, config)
    return model


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_told_and_changes_nothing(crowded: Any, case: str) -> None:
    asked, message = WRONG[case]
    before = set(crowded.state_dict()), set(crowded.peft_config)
    with pytest.raises(UsageError, match=message):
        crowded.add_weighted_adapter(
            **{"adapters": ["one", "two"], "weights": [1.0, 1.0], "adapter_name": "mix"} | asked
        )
    assert (set(crowded.state_dict()), set(crowded.peft_config)) == before


def test_all_that_is_wrong_is_told_at_once(crowded: Any) -> None:
    with pytest.raises(UsageError) as told:
        crowded.add_weighted_adapter(["one", "tow", "dora"], [1.0], "mix", combination_type="ties", density=2.0)
    assert len(str(told.value).splitlines()) == 5
