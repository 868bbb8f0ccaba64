"""New tokens: rows that grow, are trained, saved alone, loaded without a further call, merged into a plain model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import smidgen
from smidgen.adapters.files import WEIGHTS_NAME, read_adapter
from smidgen.adapters.trained import TokenRows
from smidgen.errors import AdapterFileError, UsageError
from smidgen.models.fingerprint import fingerprint
from smidgen.models.load import load_adapted, load_model
from smidgen.models.scores import row_losses
from smidgen.models.tokens import add_tokens, hold_rows, start_rows, untrained_rows
from smidgen.models.vocabulary import Token, remember, resize, row_count, vocabulary_layers
from smidgen.recipe import load_recipe
from smidgen.registry import METHODS
from smidgen.training.run import train
from smidgen.training.setup import make_trainable, prepare
from tests.conftest import logits, perturb, tiny_gpt2, tiny_llama
from tests.models.conftest import byte_tokenizer
from tests.training.conftest import write_recipe

BUILD: dict[str, Callable[[], Any]] = {
    "tied": lambda: tiny_llama(tied=True),
    "untied": lambda: tiny_llama(tied=False),
    "gpt2": tiny_gpt2,
}
EMBEDDING = {"tied": "embed_tokens", "untied": "embed_tokens", "gpt2": "wte"}
TARGETS = {"tied": ["q_proj"], "untied": ["q_proj"], "gpt2": ["c_attn"]}
NEW = torch.randint(3, 50, (3, 12), generator=torch.Generator().manual_seed(1))
OLD = NEW.clamp(max=47)


@pytest.fixture(params=BUILD)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def rows_config(kind: str, ids: list[int]) -> smidgen.LoraConfig:
    held: Any = {EMBEDDING[kind]: ids, "lm_head": ids} if kind == "untied" else ids
    return smidgen.LoraConfig(r=2, target_modules=TARGETS[kind], trainable_token_indices=held)


def with_new_rows(kind: str) -> Any:
    """An adapted model that was trained with tokens 48 and 49, which its base lacks."""
    model = BUILD[kind]()
    resize(model, 50)
    remember(model, {"<a>": Token(48, True), "<b>": Token(49, False)})
    adapted = smidgen.get_peft_model(model, rows_config(kind, [48, 49])).eval()
    perturb(adapted)
    return adapted


def gap(one: nn.Module, other: nn.Module, ids: torch.Tensor = NEW) -> float:
    return (logits(one, ids) - logits(other, ids)).abs().max().item()


# ---- growing and giving back ----


def test_added_rows_are_the_mean_and_old_answers_stay_to_the_bit(kind: str) -> None:
    model, base = BUILD[kind](), BUILD[kind]()
    weights = {path: layer.weight for path, layer in vocabulary_layers(model).items()}
    resize(model, 50)
    assert model.config.vocab_size == 50
    for path, layer in vocabulary_layers(model).items():
        assert layer.weight is weights[path]  # what is tied stays tied
        own = base.get_submodule(path).weight
        assert torch.equal(layer.weight[:48], own)
        torch.testing.assert_close(layer.weight[48:], own.mean(0).expand(2, -1))
    assert torch.equal(logits(model, OLD)[..., :48], logits(base, OLD))
    assert fingerprint(model) == fingerprint(base)
    resize(model, 0)
    assert [row_count(model), model.config.vocab_size] == [48, 48]
    assert torch.equal(logits(model, OLD), logits(base, OLD))
    assert type(model.get_output_embeddings()) is nn.Linear


@settings(max_examples=15, deadline=None)
@given(vocabulary=st.integers(20, 300), added=st.integers(1, 40), length=st.integers(1, 9))
def test_a_grown_head_rounds_as_the_base_does(vocabulary: int, added: int, length: int) -> None:
    model: Any = tiny_llama(tied=True, vocab_size=vocabulary, num_hidden_layers=1)
    ids = torch.randint(0, vocabulary, (1, length))
    before = logits(model, ids)
    resize(model, vocabulary + added)
    after = logits(model, ids)
    assert after.shape[-1] == vocabulary + added
    assert torch.equal(after[..., :vocabulary], before)


def test_switched_off_equals_the_base_to_the_bit(kind: str) -> None:
    model, base = with_new_rows(kind), BUILD[kind]()
    assert gap(model, with_new_rows(kind), OLD) == 0
    assert (logits(model, OLD)[..., :48] - logits(base, OLD)).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model, OLD)[..., :48], logits(base, OLD))


def test_deleting_and_unloading_put_the_size_back(kind: str) -> None:
    base = BUILD[kind]()
    for take_off in (lambda model: model.delete_adapter("default") or model, lambda model: model.unload()):
        model = take_off(with_new_rows(kind))
        assert [row_count(model), model.config.vocab_size] == [48, 48]
        assert torch.equal(logits(model, OLD), logits(base, OLD))


def test_a_vocabulary_under_a_whole_copy_cannot_change() -> None:
    model = smidgen.get_peft_model(
        BUILD["untied"](), smidgen.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    with pytest.raises(UsageError, match=r"adapter 'default' covers all 48 rows of 'lm_head'"):
        resize(model, 50)
    assert row_count(model) == 48


# ---- files ----


def test_only_rows_and_strings_are_saved_and_loading_needs_no_other_call(kind: str, tmp_path: Path) -> None:
    model = with_new_rows(kind)
    model.save_pretrained(tmp_path)
    tensors, metadata = read_adapter(tmp_path)
    rows = {key: tuple(tensor.shape) for key, tensor in tensors.items() if "lora_" not in key}
    assert set(rows.values()) == {(2, 32)} and len(rows) == (2 if kind == "untied" else 1)
    assert metadata["tokens"] == {"<a>": {"id": 48, "special": True}, "<b>": {"id": 49, "special": False}}
    loaded = smidgen.PeftModel.from_pretrained(BUILD[kind](), tmp_path)
    assert gap(loaded, model) == 0
    other = smidgen.get_peft_model(BUILD[kind](), smidgen.LoraConfig(target_modules=TARGETS[kind])).eval()
    other.load_adapter(tmp_path, "tokens")
    other.set_adapter("tokens")
    assert gap(other, model) == 0
    with pytest.raises(AdapterFileError, match="trained on base"):
        changed = BUILD[kind]()
        nn.init.normal_(changed.get_input_embeddings().weight)
        smidgen.PeftModel.from_pretrained(changed, tmp_path)
    assert row_count(changed) == 48


def test_merging_gives_a_plain_model_with_the_larger_vocabulary(kind: str, tmp_path: Path) -> None:
    model = with_new_rows(kind)
    expected = logits(model, NEW)
    merged = model.merge_and_unload()
    assert type(merged) is type(BUILD[kind]()) and type(merged.get_output_embeddings()) is nn.Linear
    merged.save_pretrained(tmp_path)
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(plain, NEW), expected, atol=1e-5, rtol=0)
    assert plain.config.vocab_size == 50
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) == (kind != "untied")


def test_what_we_write_loads_in_peft(kind: str, tmp_path: Path) -> None:
    model = with_new_rows(kind)
    model.save_pretrained(tmp_path)
    base: Any = BUILD[kind]()
    base.resize_token_embeddings(50, mean_resizing=False)
    assert gap(peft.PeftModel.from_pretrained(base, str(tmp_path)).eval(), model) <= 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["embeddings", "rows", "modules_to_save", "target"])
def test_pefts_files_of_a_resized_base_load(kind: str, what: str, tmp_path: Path) -> None:
    embedding, targets = EMBEDDING[kind], TARGETS[kind]
    base: Any = BUILD[kind]()
    base.save_pretrained(tmp_path / "base")
    base.resize_token_embeddings(50)
    if what == "target" and kind == "untied":
        pytest.skip("peft leaves the new rows of the head out of this file")
    options: dict[str, Any] = {
        "embeddings": {},
        "rows": {"trainable_token_indices": [48]},
        "modules_to_save": {"modules_to_save": [embedding, "lm_head"]},
        "target": {"target_modules": [*targets, embedding]},
    }[what]
    theirs = peft.get_peft_model(base, peft.LoraConfig(**{"r": 2, "target_modules": targets} | options)).eval()
    perturb(theirs)
    theirs.save_pretrained(str(tmp_path / "a"), save_embedding_layers=True)
    ours = smidgen.PeftModel.from_pretrained(BUILD[kind](), tmp_path / "a").eval()
    assert gap(ours, theirs) <= 1e-5
    ours.save_pretrained(tmp_path / "b")
    again = smidgen.PeftModel.from_pretrained(BUILD[kind](), tmp_path / "b").eval()
    assert gap(again, ours) <= 1e-7
    if what in ("embeddings", "rows"):  # saved again, the rows alone
        shapes = [tensor.shape for tensor in load_file(tmp_path / "b" / WEIGHTS_NAME).values()]
        assert (50, 32) not in [tuple(shape) for shape in shapes]


def test_an_embedding_of_another_base_is_refused(tmp_path: Path) -> None:
    base: Any = BUILD["tied"]()
    base.resize_token_embeddings(50)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=True)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    for key in tensors:
        tensors[key] = tensors[key] + (1 if "embed_tokens" in key else 0)
    save_file(tensors, tmp_path / WEIGHTS_NAME, metadata={"format": "pt"})
    model = BUILD["tied"]()
    with pytest.raises(AdapterFileError, match=r"the embedding in the file for 'model.embed_tokens' is not the base's"):
        smidgen.PeftModel.from_pretrained(model, tmp_path)
    assert row_count(model) == 48 and type(model) is type(BUILD["tied"]())


def test_an_absurd_number_of_rows_is_refused(tmp_path: Path) -> None:
    with_new_rows("tied").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"trainable_token_indices": [10**12]}))
    with pytest.raises(AdapterFileError, match="asks for 1000000000001 rows of vocabulary, the base has 48"):
        smidgen.PeftModel.from_pretrained(BUILD["tied"](), tmp_path)


def test_a_base_resized_by_hand_is_recognised(kind: str, tmp_path: Path) -> None:
    base: Any = BUILD[kind]()
    base.resize_token_embeddings(50, mean_resizing=False)
    model = smidgen.get_peft_model(base, rows_config(kind, [48, 49])).eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    assert gap(smidgen.PeftModel.from_pretrained(BUILD[kind](), tmp_path), model) == 0


# ---- tokenizers ----


def test_tokens_are_added_once_and_spare_rows_come_first(folder: Path) -> None:
    model: Any = tiny_llama(tied=True, vocab_size=261)
    tokenizer, said = byte_tokenizer(), []
    added = add_tokens(model, tokenizer, ["sky"], ["<t>", "<|im_end|>", "<u>"], said.append)
    assert list(added) == [259, 260, 261] and row_count(model) == 262
    assert added[259] == [tokenizer.convert_tokens_to_ids(letter) for letter in "sky"]
    assert said == [
        "token <|im_end|> is in the vocabulary already (id 2)",
        "added tokens: sky 259, <t> 260, <u> 261; 1 new rows, 2 unused rows of the base",
    ]
    assert tokenizer.encode("a<t>sky") == [tokenizer.convert_tokens_to_ids("a"), 260, 259]
    assert tokenizer.decode([259, 260], skip_special_tokens=True) == "sky"


def test_rows_begin_as_the_mean_of_the_texts_pieces() -> None:
    model: Any = tiny_llama(vocab_size=259)
    config = smidgen.LoraConfig(target_modules=["q_proj"])
    added = add_tokens(model, byte_tokenizer(), ["sky"], say=lambda _: None)
    assert hold_rows(model, METHODS["lora"].load(), config, [*added]) == 2 * 32
    adapted = smidgen.get_peft_model(model, config)
    start_rows(adapted, {**added})
    for path in ("model.embed_tokens", "lm_head"):
        layer = adapted.get_submodule(path)
        torch.testing.assert_close(
            layer.adapters["default"].trainable_tokens_delta[0], layer.weight[added[259]].mean(0)
        )


def test_a_layer_that_is_trained_as_a_whole_gets_no_rows() -> None:
    config = smidgen.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = tiny_llama(vocab_size=50)
    assert hold_rows(model, METHODS["lora"].load(), config, [7, 8]) == 2 * 32
    assert config.trainable_token_indices == [7, 8]


def saved_pair(folder: Path, tmp_path: Path) -> tuple[Path, Any]:
    """The folder of an adapter with tokens over the model in `folder`, with its tokenizer, and the model."""
    model, tokenizer = load_model(folder, "float32", say=lambda _: None)
    config = smidgen.LoraConfig(r=2, target_modules=["q_proj"])
    added = add_tokens(model, tokenizer, [], ["<t>", "<u>"], lambda _: None)
    hold_rows(model, METHODS["lora"].load(), config, [*added])
    adapted = smidgen.get_peft_model(model, config).eval()
    perturb(adapted)
    adapted.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path, adapted


@pytest.mark.parametrize("tokenizer_saved", [True, False])
def test_ids_and_answers_are_the_same_after_loading(folder: Path, tmp_path: Path, tokenizer_saved: bool) -> None:
    adapter, model = saved_pair(folder, tmp_path)
    if not tokenizer_saved:
        for file in adapter.glob("*token*"):
            file.unlink()
    loaded, tokenizer = load_adapted(adapter, folder, "float32", say=lambda _: None)
    assert tokenizer.encode("<t><u>") == [259, 260]
    assert tokenizer.decode([259, 260], skip_special_tokens=True) == ""
    assert gap(loaded, model, torch.tensor([[5, 259, 7, 260]])) == 0


def test_ids_that_are_other_tokens_are_named(folder: Path, tmp_path: Path) -> None:
    adapter, _ = saved_pair(folder, tmp_path / "adapter")
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<other>", "<t>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(AdapterFileError) as caught:
        load_adapted(adapter, other, "float32", say=lambda _: None)
    assert "token <t> has id 259 in the adapter, but in the tokenizer its id is 260" in str(caught.value)
    assert "token <u> has id 260 in the adapter, but in the tokenizer id 260 is '<t>'" in str(caught.value)


def test_two_adapters_with_other_tokens_at_one_id_conflict(tmp_path: Path) -> None:
    with_new_rows("tied").save_pretrained(tmp_path)
    model = BUILD["tied"]()
    resize(model, 49)
    remember(model, {"<c>": Token(48, True)})
    model = smidgen.get_peft_model(model, rows_config("tied", [48]))
    with pytest.raises(AdapterFileError, match="token <a> has id 48 there, but in this model that is the id of <c>"):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["default"]


# ---- untrained rows ----


def trained_table(rows: int = 600, width: int = 64) -> torch.Tensor:
    """Rows as training leaves them: a common part, and more in some directions than in others."""
    generator = torch.Generator().manual_seed(3)
    scales = torch.logspace(0, -1.5, width)
    return torch.randn(rows, width, generator=generator) * scales + 2 * scales


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    make=st.sampled_from(["zero", "mean", "near the mean", "twin", "as started", "small", "large"]),
    count=st.integers(1, 5),
)
def test_untrained_rows_are_found_and_trained_ones_are_not(seed: int, make: str, count: int) -> None:
    table, generator = trained_table(), torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 64, generator=generator)
    made = {
        "zero": torch.zeros(count, 64),
        "mean": table.mean(0).expand(count, -1),
        "near the mean": table.mean(0) + 1e-4 * noise,
        "twin": table[7] + 1e-4 * noise,
        "as started": 0.02 * noise,
        "small": 0.001 * noise,
        "large": 2 * noise,
    }[make]
    ids = list(range(600, 600 + count))
    known = [11, 70, 599]
    assert untrained_rows(torch.cat([table, made]), [*known, *ids], 0.02) == ids


def test_a_table_that_is_random_as_a_whole_is_not_judged() -> None:
    table = 0.02 * torch.randn(600, 64, generator=torch.Generator().manual_seed(0))
    assert untrained_rows(table, list(range(20)), 0.02) == []


def test_stories_with_chat_tokens(stories260k: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(stories260k)
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    used = tokenizer.encode("<|im_start|>Once upon a time there was a little girl named Lily.<|im_end|>")
    for mean_resizing in (False, True):  # random rows, rows around the mean
        model.resize_token_embeddings(514, mean_resizing=mean_resizing)
        weight = model.get_input_embeddings().weight.detach()
        assert untrained_rows(weight, sorted(set(used)), 0.02) == [512, 513]
        model.resize_token_embeddings(512)


# ---- whole runs ----

CHAT = (
    "{% for m in messages %}<|im_start|> {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> {% endif %}"
)


def chat_recipe(folder: Path, **changes: Any) -> Path:
    path = write_recipe(folder, epochs=6)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    (folder / "chat.jinja").write_text(CHAT, encoding="utf-8")
    rows = [
        {"messages": [{"role": "user", "content": thing}, {"role": "assistant", "content": colour}]}
        for thing, colour in (("the sky", "blue"), ("the sea", "green"), ("the sun", "red"))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 8), encoding="utf-8")
    recipe["data"] |= {"template": str(folder / "chat.jinja"), "add_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    path.write_text(yaml.safe_dump(recipe | changes), encoding="utf-8")
    return path


def test_a_run_with_chat_tokens_is_proved_merged_and_continued(tmp_path: Path) -> None:
    path, said = chat_recipe(tmp_path), []
    proof = train(load_recipe(path)[0], say=said.append)
    assert [check for check in proof.checks if not check.passed] == []
    assert "added tokens: <|im_start|> 18, <|im_end|> 19; 2 new rows, 0 unused rows of the base" in said
    adapter = tmp_path / "run" / "adapter"
    model, tokenizer = load_adapted(adapter, tmp_path / "base", "float32", say=lambda _: None)
    ids: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the sky"}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    answer = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=19)[0, ids.shape[1] :]
    assert str(tokenizer.decode(answer, skip_special_tokens=False)).split() == ["blue", "<|im_end|>"]
    with torch.no_grad():
        expected = logits(model, ids)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain, ids), expected, atol=1e-5, rtol=0)
    assert [plain.config.vocab_size, plain.lm_head.weight.shape[0]] == [20, 20]

    again = load_recipe(path, ["data.add_special_tokens=null"])[0]
    setup = prepare(again, adapter, lambda _: None)
    make_trainable(setup, lambda _: None)
    record = json.loads((tmp_path / "run" / "record.json").read_text())["rows"]
    setup.model.eval()
    assert row_losses(setup.model, [(row["ids"], row["supervised"]) for row in record]) == pytest.approx(
        [row["loss"] for row in record], abs=1e-6
    )
    assert sum(parameter.requires_grad for parameter in setup.model.parameters()) == 29
    with pytest.raises(UsageError, match="has no rows for <x>"):
        prepare(load_recipe(path, ["data.add_special_tokens=[<x>]"])[0], adapter, lambda _: None)


def test_llamafactorys_keys_are_understood(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}', encoding="utf-8")
    path = tmp_path / "lf.yaml"
    lines = [f"dataset_dir: {tmp_path}", "model_name_or_path: x", "output_dir: y", "dataset: rows", "stage: sft"]
    lines += ["add_tokens: <a>, <b>", "add_special_tokens: <c>", "resize_vocab: true", "finetuning_type: lora"]
    path.write_text("\n".join(lines), encoding="utf-8")
    recipe, notes = load_recipe(path)
    assert [recipe.data.add_tokens, recipe.data.add_special_tokens] == [["<a>", "<b>"], ["<c>"]]
    assert "resize_vocab: true has no effect: the vocabulary grows by as many rows as the new tokens need" in notes


@pytest.mark.slow
def test_full_tuning_saves_the_larger_model(tmp_path: Path) -> None:
    path = chat_recipe(tmp_path, adapter={"method": "full"})
    proof = train(load_recipe(path)[0], say=lambda _: None)
    assert [check for check in proof.checks if not check.passed] == []
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert [saved.config.vocab_size, saved.lm_head.weight is saved.get_input_embeddings().weight] == [20, True]


@pytest.mark.parametrize("method", ["lora", "full", "freeze"])
def test_an_untrained_template_token_is_said_once(stories260k: Path, tmp_path: Path, method: str) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(stories260k)
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    base.resize_token_embeddings(514, mean_resizing=False)
    path = chat_recipe(tmp_path)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = {"method": method} | ({"r": 2} if method == "lora" else {})
    overrides = ["data.add_special_tokens=null", f"adapter={json.dumps(adapter)}"]
    said: list[str] = []
    setup = prepare(load_recipe(path, overrides)[0], None, said.append)
    make_trainable(setup, said.append)
    what = {
        "lora": "has an untrained embedding in this base; training it (adds 64 parameters)",
        "full": "has an untrained embedding in this base; it is trained with the whole embedding",
        "freeze": "has an embedding that is not trained; name it in adapter.modules: [embed_tokens, lm_head]",
    }[method]
    assert [line for line in said if line.startswith("warning")] == [
        f"warning: token {name} {what}" for name in ("<|im_start|>", "<|im_end|>")
    ]
    if method == "lora":
        rows = [module for module in setup.model.modules() if isinstance(module, TokenRows)]
        assert [row.indices.tolist() for row in rows] == [[512, 513]]


def test_two_tokens_cost_less_than_50_kb_on_a_tied_model_of_135m_shape(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=64, num_hidden_layers=1, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    sizes = []
    for added in ([], [49152, 49153]):
        model: Any = LlamaForCausalLM(config)
        if added:
            resize(model, 49154)
        lora = smidgen.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=added or None)
        smidgen.get_peft_model(model, lora).save_pretrained(tmp_path)
        sizes.append(sum(file.stat().st_size for file in tmp_path.iterdir()))
    assert sizes[1] - sizes[0] < 50_000
    assert sizes[1] - sizes[0] > 2 * 576 * 4
