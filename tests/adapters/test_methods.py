"""What single methods promise beyond the laws: defaults, errors in plain words, dropout, small numbers over 16 bits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import smidgen
from smidgen.adapters.attach import adapters_of
from smidgen.adapters.masks import score_weights
from smidgen.errors import TargetError, UsageError
from smidgen.registry import METHODS
from tests.conftest import logits, perturb, tiny_gpt2, tiny_llama, tokens, toy
from tests.laws.cases import QV, biased


def config(method: str, **options: Any) -> Any:
    return METHODS[method].load().config_class(**options)


def adapted(method: str, build: Any = tiny_llama, **options: Any) -> Any:
    torch.manual_seed(3)
    return smidgen.get_peft_model(build(), config(method, **options))


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("loha", {"r": 0}, "r: must be a whole number from 1 to 65536, got 0"),
        ("loha", {"rank_pattern": {"q": 0}}, "rank_pattern['q']: must be a whole number"),
        ("loha", {"module_dropout": 1.5}, "module_dropout: must be from 0 to below 1, got 1.5"),
        ("lokr", {"decompose_factor": 0}, "decompose_factor: must be -1 or a whole number from 1, got 0"),
        ("lokr", {"init_weights": "lyco"}, "init_weights: must be true, false or 'lycoris', got 'lyco'"),
        ("vera", {"bias": "some"}, "bias: must be 'none', 'all' or 'vera_only', got 'some'"),
        ("vera", {"projection_prng_key": -1}, "projection_prng_key: must be a whole number from 0"),
        ("oft", {"r": 4}, "r: 4 and oft_block_size: 32; one of them must be 0, the other not"),
        ("oft", {"num_cayley_neumann_terms": 1}, "num_cayley_neumann_terms: must be a whole number from 2"),
        ("boft", {"boft_block_size": 0}, "boft_block_size: 0 and boft_block_num: 0; one of them must be 0"),
        ("boft", {"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor: must be a whole number from 1 to 16"),
        ("hra", {"r": -1}, "r: must be a whole number"),
        ("fourierft", {"n_frequency": 0}, "n_frequency: must be a whole number"),
        ("randlora", {"r": 0, "randlora_dropout": 1.0}, "randlora_dropout: must be from 0 to below 1, got 1.0"),
        ("miss", {"init_weights": "balance"}, "init_weights: must be true, false, 'bat' or 'mini', got 'balance'"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(method: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        config(method, **options)
    assert said in str(caught.value)


LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("method", "build", "options", "said"),
    [
        ("ia3", tiny_llama, {"target_modules": QV, "feedforward_modules": ["up_proj"]}, "'up_proj' matches none of"),
        ("ia3", tiny_llama, {"target_modules": ["embed_tokens"]}, "'model.embed_tokens' is a Embedding; IA3 adapts"),
        ("ia3", toy, {}, "no keys, values or feed-forward layers known by name; name the targets"),
        ("loha", tiny_llama, {"target_modules": ["embed_tokens"]}, "is a Embedding; LoHa adapts Linear, Conv"),
        ("loha", tiny_llama, {"target_modules": QV, "rank_pattern": {"k_proj": 3}}, "'k_proj' matches none of the"),
        ("vera", toy, {"target_modules": ["conv1", "linear"]}, "'conv1' is a Conv1d; Vera adapts Linear"),
        ("ln_tuning", tiny_llama, {"target_modules": ["nrom"]}, "'nrom' matches 0 modules; did you mean 'norm'?"),
        ("bitfit", tiny_llama, {}, "has nothing that it trains; it has no biases: take ln_tuning or ia3"),
        ("bitfit", biased, {"target_modules": ["norm"]}, "'model.norm' is a LlamaRMSNorm with nothing to train"),
        ("boft", tiny_llama, {"boft_block_size": 5}, f"{LAYER}: boft_block_size: 5 does not divide the 32 inputs"),
        ("boft", tiny_llama, {"boft_block_size": 8, "boft_n_butterfly_factor": 4}, "a multiple of 8; there are 4 of 8"),
        ("hra", tiny_llama, {"r": 40, "apply_GS": True}, f"{LAYER}: r: 40 directions cannot be orthogonal among 32"),
        ("hra", tiny_llama, {"target_modules": ["embed_tokens"]}, "is a Embedding; HRA adapts"),
        ("fourierft", tiny_llama, {"n_frequency": 2000}, f"{LAYER}: n_frequency: 2000 is more than the 1024 numbers"),
        ("shira", tiny_llama, {}, f"{LAYER}: r: 32 asks for 2048 entries, the weight has 1024"),
        ("miss", tiny_llama, {"r": 33}, f"{LAYER}: r: 33 is more than the layer's 32 inputs"),
        ("miss", tiny_llama, {"r": 5, "init_weights": "bat"}, "it must divide the sides 32 and 32, got 5"),
        ("miss", tiny_llama, {"r": 8, "init_weights": "mini", "mini_r": 5}, "mini_r: must divide the layer's 32"),
        ("trainable_tokens", tiny_llama, {}, "token_indices: an empty list; the vocabulary has 48 rows"),
        ("trainable_tokens", tiny_llama, {"token_indices": [99]}, "token_indices: [99]; the vocabulary has 48 rows"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_changes(
    method: str, build: Any, options: dict[str, Any], said: str
) -> None:
    model = build()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(TargetError) as caught:
        smidgen.get_peft_model(model, config(method, **options))
    assert said in str(caught.value)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("method", ["ia3", "ln_tuning"])
def test_default_targets_are_pefts(method: str, build: Any) -> None:
    theirs = peft.PEFT_TYPE_TO_CONFIG_MAPPING[METHODS[method].load().config_class.peft_type]()
    peft.get_peft_model(build(), theirs)
    ours = adapted(method, build).peft_config["default"]
    paths = [name for name, _ in build().named_modules()]
    for field in {"target_modules", "feedforward_modules"} & vars(theirs).keys():
        found = [{p for p in paths if any(p.endswith(n) for n in getattr(each, field))} for each in (ours, theirs)]
        assert found[0] == found[1] and found[0], field


def test_targets_that_were_left_out_are_written_as_what_was_taken(tmp_path: Path) -> None:
    adapted("vera", r=4).save_pretrained(tmp_path)
    assert smidgen.PeftConfig.from_pretrained(tmp_path).target_modules == "all-linear"
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    assert sum(name.endswith("vera_lambda_b.default") for name, _ in theirs.named_parameters()) == 14


def test_fields_that_other_tools_lack_are_written_only_where_they_are_set(tmp_path: Path) -> None:
    model = adapted("vera", target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"], r=4)
    perturb(model)
    model.save_pretrained(tmp_path)
    assert smidgen.PeftConfig.from_pretrained(tmp_path).exclude_modules == ["v_proj"]
    with pytest.warns(UserWarning, match="exclude_modules"):  # peft says that it ignores it: v_proj then starts anew
        theirs = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    torch.testing.assert_close(logits(theirs.eval(), tokens()), logits(model.eval(), tokens()))


# --- dropout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("loha", {"r": 2, "rank_dropout": 0.5}),
        ("loha", {"r": 2, "module_dropout": 0.5}),
        ("lokr", {"r": 2, "rank_dropout": 0.5}),
        ("lokr", {"r": 2, "rank_dropout": 0.5, "rank_dropout_scale": True}),
        ("vera", {"r": 4, "vera_dropout": 0.5}),
        ("oft", {"oft_block_size": 8, "module_dropout": 0.5}),
        ("boft", {"boft_dropout": 0.5}),
        ("randlora", {"r": 4, "randlora_dropout": 0.5}),
        ("miss", {"r": 8, "miss_dropout": 0.5}),
    ],
)
def test_dropout_acts_in_training_only(method: str, options: dict[str, Any]) -> None:
    model = adapted(method, target_modules="all-linear", **options)
    plain = adapted(method, target_modules="all-linear", **options)
    perturb(model)
    perturb(plain)
    drawn = [logits(model.train(), tokens()) for _ in range(4)]
    assert any(not torch.equal(drawn[0], other) for other in drawn[1:])
    assert torch.equal(logits(model.eval(), tokens()), logits(plain.eval(), tokens()))


def test_dropped_blocks_are_not_rotated() -> None:
    model = adapted("oft", target_modules=["q_proj"], oft_block_size=8, module_dropout=0.999999)
    perturb(model)
    assert torch.equal(logits(model.train(), tokens()), logits(tiny_llama(), tokens()))
    assert not torch.equal(logits(model.eval(), tokens()), logits(tiny_llama(), tokens()))


def test_rows_that_are_kept_make_up_for_dropped_ones() -> None:
    model = adapted("loha", target_modules=["q_proj"], r=2, rank_dropout=0.5)
    perturb(model)
    _, adapter = next(adapters_of(model, "default"))
    whole, dropped = adapter.eval().delta(), adapter.train().delta()
    kept = dropped.abs().sum(1) > 0
    assert 0 < kept.sum() < len(kept)
    torch.testing.assert_close(dropped[kept], whole[kept] * len(kept) / kept.sum())


# --- small numbers over 16-bit bases -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "scale"),
    [
        ("ia3", {"target_modules": ["q_proj"], "feedforward_modules": []}, 1e-2),
        ("ia3", {"target_modules": ["q_proj"], "feedforward_modules": ["q_proj"]}, 1e-2),
        ("oft", {"target_modules": ["q_proj"], "oft_block_size": 8}, 3e-4),
        ("boft", {"target_modules": ["q_proj"]}, 1e-3),
        ("loha", {"target_modules": ["q_proj"], "r": 2}, 5e-2),
        ("miss", {"target_modules": ["q_proj"], "r": 8}, 1e-4),
    ],
)
def test_a_small_change_is_not_lost_over_a_16_bit_base(method: str, options: dict[str, Any], scale: float) -> None:
    """The change of one layer's answers, summed over many rows so that the rounding of the answers averages out."""
    layer = nn.Sequential()
    layer.add_module("q_proj", nn.Linear(64, 64, bias=False))
    made = []
    for base in (copy.deepcopy(layer), copy.deepcopy(layer).bfloat16()):
        torch.manual_seed(0)
        made.append(smidgen.get_peft_model(base, config(method, **options)))
        perturb(made[-1], scale=scale)
    wide, narrow = made
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))

    def change(model: Any, inputs: Tensor) -> Tensor:
        with model.disable_adapter():
            base = model(inputs)
        return inputs.float().T @ (model(inputs).float() - base.float())

    expected, actual = change(wide, x), change(narrow, x.bfloat16())
    assert torch.cosine_similarity(expected.flatten(), actual.flatten(), dim=0) > 0.9


# --- against the reference, where its own forward is not to be trusted, and where its files differ ----------------


class Picture(nn.Module):
    """Tokens in, numbers out, through a padded two-dimensional convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 2, 3, padding=1, stride=2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.second(torch.tanh(self.conv(self.embed(tokens).unsqueeze(1)))).flatten(1)


def picture() -> nn.Module:
    torch.manual_seed(0)
    return Picture().eval()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("oft", {"oft_block_size": 3}),
        ("boft", {"boft_block_size": 3}),
        ("hra", {"r": 2}),
        ("loha", {"r": 2}),
        ("loha", {"r": 2, "use_effective_conv2d": True}),
        ("lokr", {"r": 1, "use_effective_conv2d": True}),
        ("ia3", {"feedforward_modules": ["second"]}),
    ],
)
def test_padded_kernels_answer_as_pefts_merged_weight(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs_config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[METHODS[method].load().config_class.peft_type]
    theirs = peft.get_peft_model(picture(), theirs_config(target_modules=["conv", "second"], **options)).eval()
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    ours = smidgen.PeftModel.from_pretrained(picture(), tmp_path)
    expected = theirs.merge_and_unload()(tokens())
    assert (expected - picture()(tokens())).abs().max() > 1e-2
    torch.testing.assert_close(ours(tokens()), expected, atol=1e-5, rtol=0)


def test_rotation_of_a_padded_kernel_starts_as_the_base() -> None:
    model = adapted("oft", picture, target_modules=["conv", "second"], oft_block_size=3)
    torch.testing.assert_close(model(tokens()), picture()(tokens()), atol=1e-6, rtol=0)


def test_butterfly_factors_are_pefts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """peft builds them with a GPU only; here its own code runs, with the one GPU kernel written out in torch."""
    from peft.tuners.boft import layer

    class BlockDiagonal:
        @staticmethod
        def apply(blocks: Tensor) -> Tensor:
            return torch.stack([torch.block_diag(*factor) for factor in blocks])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", BlockDiagonal)
    options: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "boft_block_size": 4}
    theirs = peft.get_peft_model(biased(), peft.BOFTConfig(boft_n_butterfly_factor=3, **options)).eval()
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    ours = smidgen.PeftModel.from_pretrained(biased(), tmp_path)
    expected = logits(theirs, tokens())
    assert (expected - logits(biased(), tokens())).abs().max() > 1e-2
    torch.testing.assert_close(logits(ours, tokens()), expected, atol=1e-5, rtol=0)


def test_shared_matrices_are_in_memory_and_in_the_file_once(tmp_path: Path) -> None:
    for method in ("vera", "randlora"):
        model = adapted(method, r=4)
        adapters = [adapter for _, adapter in adapters_of(model, "default")]
        assert len(adapters) == 14 and len({id(adapter.shared) for adapter in adapters}) == 1
        assert len({id(adapter.shared) for _, adapter in adapters_of(copy.deepcopy(model).half(), "default")}) == 1
        model.save_pretrained(tmp_path / method)
        keys = load_file(tmp_path / method / "adapter_model.safetensors").keys()
        assert sum(key.rpartition("_")[2] in ("A", "B") for key in keys) == 2


def test_a_repeated_matrix_that_differs_is_told(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    theirs = peft.get_peft_model(tiny_llama(), peft.RandLoraConfig(target_modules=QV, r=8))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"base_model.model.{LAYER}.randlora_A"] += 1
    save_file(tensors, path)
    with pytest.raises(UsageError, match=r"randlora_A differs from base_model\.randlora_A, which it should repeat"):
        smidgen.PeftModel.from_pretrained(tiny_llama(), tmp_path)


# --- sparse entries -----------------------------------------------------------------------------------------------


def _batches(model: nn.Module) -> list[dict[str, Tensor]]:
    return [{"input_ids": row[None], "labels": row[None]} for row in tokens()]


@pytest.mark.parametrize("mask", ["gradient", "fisher"])
def test_entries_that_data_moves_most_are_trained_and_come_back_with_the_file(mask: str, tmp_path: Path) -> None:
    model, options = tiny_llama(), config("shira", target_modules=QV, r=1, mask_type=mask)
    options.scores = score_weights(model, options, _batches(model))
    gradients = []
    for batch in _batches(model):
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append(model.get_submodule(LAYER).weight.grad.double())
    expected = sum(g.square() if mask == "fisher" else g for g in gradients).abs() / len(gradients)
    torch.testing.assert_close(options.scores[LAYER].double(), expected, atol=1e-7, rtol=1e-4)
    model = smidgen.get_peft_model(tiny_llama(), options)
    perturb(model)
    rows, columns = model.get_submodule(LAYER).adapters["default"].shira_indices
    assert len(rows) == 64 and expected[rows, columns].min() >= expected.flatten().sort().values[-64] * 0.999
    model.save_pretrained(tmp_path)
    for trainable in (False, True):
        loaded = smidgen.PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=trainable)
        assert torch.equal(logits(loaded.eval(), tokens()), logits(model.eval(), tokens()))


def test_a_mask_of_data_without_data_is_refused() -> None:
    with pytest.raises(TargetError, match=r"mask_type: 'fisher' needs data: set config\.scores = "):
        adapted("shira", r=1, mask_type="fisher")
    with pytest.raises(TargetError, match=r"mask_type: no 'magnitud'; did you mean 'magnitude'\?"):
        adapted("shira", r=1, mask_type="magnitud")
    model = tiny_llama()
    with pytest.raises(UsageError, match="batches: the model answers no loss"):
        score_weights(model, config("shira", mask_type="fisher"), [{"input_ids": tokens()}])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_file_whose_mask_was_made_by_code_loads_without_it(tmp_path: Path) -> None:
    options = peft.ShiraConfig(target_modules=QV, r=1, mask_type="mine")
    options.mask_fn = lambda layer, r, **_: torch.zeros_like(layer.weight).index_fill(1, torch.arange(2 * r), 1.0)
    theirs = peft.get_peft_model(tiny_llama(num_key_value_heads=4), options)
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    ours = smidgen.PeftModel.from_pretrained(tiny_llama(num_key_value_heads=4), tmp_path)
    torch.testing.assert_close(logits(ours, tokens()), logits(theirs.eval(), tokens()), atol=1e-5, rtol=0)


def test_the_largest_entries_are_trained() -> None:
    model = adapted("shira", target_modules=["q_proj"], r=1, mask_type="magnitude")
    weight = model.get_submodule(LAYER).weight.detach().abs()
    rows, columns = model.get_submodule(LAYER).adapters["default"].shira_indices
    assert weight[rows, columns].min() == weight.flatten().sort().values[-64]


def test_entries_outside_of_the_weight_are_refused(tmp_path: Path) -> None:
    model = adapted("shira", target_modules=QV, r=1)
    model.get_submodule(LAYER).adapters["default"].shira_indices[0, 0] = 32
    model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="shira_indices: an entry lies outside of the weight"):
        smidgen.PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_trained_rows_of_a_head_keep_its_bias() -> None:
    model = nn.Sequential()
    model.add_module("head", nn.Linear(8, 6))
    x = torch.randn(3, 8)
    expected = model(x)
    model = smidgen.get_peft_model(model, config("trainable_tokens", target_modules=["head"], token_indices=[1, 4]))
    assert torch.equal(model(x)[:, [0, 2, 3, 5]], expected[:, [0, 2, 3, 5]])
    torch.testing.assert_close(model(x), expected)
