"""The halves of a vision-language model: what is adapted, trained, frozen, saved, merged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from smidgen.adapters.attach import adapters_of
from smidgen.adapters.targets import language_half
from smidgen.data.packing import Batch, _padded
from smidgen.errors import DataError
from smidgen.export.merge import merge_to_folder
from smidgen.losses.reduce import mean_share
from smidgen.models.fuse import fused
from smidgen.models.generate import generate_batch
from smidgen.models.images import image_inputs, projectors_of
from smidgen.models.load import load_adapted, load_model
from smidgen.models.quantize import quantization_config, quantized_layers
from smidgen.models.scores import row_losses, token_losses
from smidgen.recipe import load_recipe
from smidgen.training import setup
from tests.conftest import perturb
from tests.vision.conftest import chat, load, prepared, write_images, write_rows

DIGITS = "3 141 5 92".split()


def recipe_of(base: Path, rows: Path, method: str = "lora", **fields: Any) -> Any:
    recipe = {
        "model": str(base),
        "adapter": {"method": method},
        "data": {"train": str(rows), "max_length": 200},
        "train": {"dtype": "float32"},
        "output": str(rows.parent / "run"),
    }
    path = rows.parent / "recipe.yaml"
    path.write_text(json.dumps(recipe | fields), encoding="utf-8")
    return load_recipe(path)[0]


def rows_file(folder: Path) -> Path:
    """Four rows: of one image, of two, of a wide one, of none."""
    names = write_images(folder)
    chosen = [names[:1], names[:2], names[1:2], []]
    return write_rows(folder, [chat(images, digits) for images, digits in zip(chosen, DIGITS, strict=True)])


def made(base: Path, folder: Path, method: str = "lora", **fields: Any) -> tuple[setup.Setup, list[str]]:
    """A run that is ready to begin, and what it said."""
    said: list[str] = []
    ready = setup.prepare(recipe_of(base, rows_file(folder), method, **fields), None, said.append)
    setup.make_trainable(ready, said.append)
    return ready, said


def together(ready: setup.Setup, part: list[int]) -> Batch:
    """One batch of these rows, of whatever lengths."""
    return _padded([ready.data.train[index] for index in part], part, 0)


def answers(model: Any, batch: Batch) -> Tensor:
    """Logits (B, T, V) of a padded batch with its images."""
    with torch.no_grad():
        inputs = image_inputs(model, batch.images)
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **inputs).logits


@pytest.mark.parametrize("method", ["lora", "ln_tuning", "ia3", "bottleneck", "adalora"])
def test_adapters_stand_in_the_language_half_alone(base, tmp_path, method):
    ready, said = made(base, tmp_path, method)
    half, (projector,) = language_half(ready.model), projectors_of(ready.model)
    places = {path for path, _ in adapters_of(ready.model, "default")}
    beside = {path for path in places if not path.startswith(half)}
    assert half.endswith(("language_model.", "text_model.")) and beside == {f"model.{projector}"}
    assert "vision encoder: frozen; projector: trained" in said
    assert "packing: off (rows have images)" in said


def test_gradients_reach_projector_and_lora_and_nothing_of_the_encoder(base, tmp_path):
    ready, _ = made(base, tmp_path)
    perturb(ready.model)
    token_losses(ready.model, together(ready, [0, 1, 2, 3]))[0].sum().backward()
    moved = {name for name, p in ready.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == ready.learners.keys() and not any("vision" in name for name in moved)
    assert {"projector" in name or "connector" in name for name in moved} == {True, False}


def gradients(ready: setup.Setup, batches: list[Batch]) -> dict[str, Tensor]:
    count = sum(batch.supervised for batch in batches)
    ready.model.zero_grad()
    for batch in batches:
        mean_share(token_losses(ready.model, batch)[0], count).backward()
    return {name: parameter.grad.clone() for name, parameter in ready.learners.items() if parameter.grad is not None}


def test_gradients_do_not_depend_on_the_cut_into_micro_batches(base, tmp_path):
    """One batch of four rows, two of two, four of one, with and without kernels."""
    ready, _ = made(base, tmp_path)
    perturb(ready.model)
    ready.model.eval()
    cuts = [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1], [2], [3]]]
    found = [gradients(ready, [together(ready, part) for part in cut]) for cut in cuts]
    with fused(ready.model, lambda line: None):
        found.append(gradients(ready, [together(ready, [0, 1, 2, 3])]))
    for other in found[1:]:
        for name, expected in found[0].items():
            torch.testing.assert_close(other[name], expected, rtol=1e-3, atol=2e-5, msg=name)


def test_peft_loads_the_adapter_and_the_projector(base, tmp_path):
    """Keys, and logits of rows with images, against peft on the same base."""
    ready, _ = made(base, tmp_path)
    perturb(ready.model)
    ready.model.eval().save_pretrained(tmp_path / "adapter")
    batch = together(ready, [0, 1, 2])
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter"
    ).eval()
    with torch.no_grad():
        inputs = image_inputs(ready.model, batch.images)
        expected = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **inputs).logits
    torch.testing.assert_close(answers(ready.model, batch), expected, rtol=1e-4, atol=1e-4)


def test_saved_and_loaded_answers_the_same_and_switched_off_as_the_base(base, tmp_path):
    ready, _ = made(base, tmp_path)
    batch = together(ready, [0, 1, 2])
    before = answers(load(base)[0], batch)
    perturb(ready.model)
    ready.model.eval().save_pretrained(tmp_path / "adapter")
    expected = answers(ready.model, batch)
    assert not torch.equal(expected, before)
    loaded, _ = load_adapted(tmp_path / "adapter", base, "float32", say=lambda line: None)
    assert torch.equal(answers(loaded, batch), expected)
    with loaded.disable_adapter():
        assert torch.equal(answers(loaded, batch), before)


FRESH = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from smidgen.models.images import image_inputs
from smidgen.models.load import load_adapted
folder, base, *images = sys.argv[1:]
model, _ = load_adapted(Path(folder, "adapter"), Path(base), "float32", say=lambda line: None)
logits = model(**load_file(Path(folder, "batch")), **image_inputs(model, images)).logits
save_file({"logits": logits.detach().contiguous()}, Path(folder, "logits"))
"""


@pytest.mark.slow
def test_a_new_process_gives_equal_logits(base, tmp_path):
    ready, _ = made(base, tmp_path)
    perturb(ready.model)
    ready.model.eval().save_pretrained(tmp_path / "adapter")
    batch = together(ready, [0, 1, 2])
    assert batch.attention_mask is not None
    save_file({"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}, tmp_path / "batch")
    subprocess.run([sys.executable, "-c", FRESH, str(tmp_path), str(base), *batch.images], check=True)
    assert torch.equal(load_file(tmp_path / "logits")["logits"], answers(ready.model, batch))


def test_merged_it_answers_the_same_and_is_a_whole_model(base, tmp_path):
    """With its processor: the merged folder takes images as the base did."""
    ready, _ = made(base, tmp_path)
    perturb(ready.model, scale=0.03)
    batch = together(ready, [0, 1, 2])
    expected = answers(ready.model.eval(), batch)
    merge_to_folder(ready.model, ready.tokenizer, tmp_path / "merged", torch.float32, lambda line: None)
    merged, _ = load(tmp_path / "merged")
    assert type(merged).__name__ == type(load(base)[0]).__name__
    torch.testing.assert_close(answers(merged, batch), expected, rtol=1e-3, atol=1e-3)


def test_rows_of_a_batch_are_answered_as_alone(base, tmp_path):
    """Greedy answers of prompts padded on the left, and losses, each row with its own images."""
    model, tokenizer = load(base)
    rows = list(prepared(model, tokenizer, rows_file(tmp_path)).train)
    prompts, images = [row.input_ids[: row.prompt_length].tolist() for row in rows], [row.images for row in rows]
    options: dict[str, Any] = {"max_new_tokens": 6, "stop_ids": set()}
    looked: list[int] = []
    encoder = next(module for path, module in model.named_modules() if path.endswith(("vision_tower", "vision_model")))
    encoder.register_forward_hook(lambda module, given, answer: looked.append(len(answer.last_hidden_state)))
    found = generate_batch(model, tokenizer, prompts, images=images, **options)
    assert len(looked) == 1 and looked[0] >= 4  # once for all tokens of the answers
    alone = [generate_batch(model, tokenizer, [p], images=[i], **options)[0] for p, i in zip(prompts, images)]
    assert found == alone
    losses = row_losses(model, [(row.input_ids.tolist(), row.supervised.tolist()) for row in rows], images)
    batch = _padded(rows, [0, 1, 2, 3], 0)
    values, places = token_losses(model, batch)
    for index, loss in enumerate(losses):
        assert values[places == index].mean().item() == pytest.approx(loss, rel=1e-3)


def test_the_language_half_alone_is_quantised(llava, tmp_path):
    """And the projector is trained above it, as in full precision."""
    model, _ = load_model(llava, quantization_config=quantization_config("nf4"), say=lambda line: None)
    paths = [path for path, _ in quantized_layers(model)]
    assert len(paths) == 14 and all(path.startswith("model.language_model.") for path in paths)
    ready, said = made(llava, tmp_path, quantize="nf4", train={"dtype": "bfloat16"})
    token_losses(ready.model, together(ready, [0, 1, 2, 3]))[0].sum().backward()
    assert "vision encoder: frozen; projector: trained" in said
    assert all(p.grad is not None for name, p in ready.learners.items() if "projector" in name)


def test_the_projector_stays_as_it_is_where_the_recipe_says_so(llava, tmp_path):
    _, said = made(llava, tmp_path, adapter={"method": "lora", "modules_to_save": []})
    assert "vision encoder: frozen; projector: frozen" in said


def test_starts_from_data_see_the_images(base, tmp_path):
    """Of other images they are others."""
    fields = {"adapter": {"method": "lora", "r": 2, "init_lora_weights": "lora_ga"}}
    seen, _ = made(base, tmp_path, **fields)
    whole = seen.model.state_dict()
    assert all(tensor.isfinite().all() for tensor in whole.values())
    for path in list(tmp_path.glob("*.png")):
        path.unlink()
    write_images(tmp_path, seed=1)
    other = setup.prepare(recipe_of(base, tmp_path / "rows.jsonl", **fields), None, lambda line: None)
    setup.make_trainable(other, lambda line: None)
    changed = [name for name, tensor in other.model.state_dict().items() if not torch.equal(tensor, whole[name])]
    assert any("start_A" in name for name in changed)


def test_full_tuning_says_what_it_trains(llava, tmp_path):
    _, said = made(llava, tmp_path, "full")
    assert "vision encoder: trained; projector: trained" in said


def test_what_cannot_take_images_refuses_them(llava, tmp_path):
    with pytest.raises(DataError, match="rows have images, and PromptTuning stands around the tokens alone; take lora"):
        made(llava, tmp_path, adapter={"method": "prompt_tuning", "num_virtual_tokens": 4})
    with pytest.raises(DataError, match=r"data\.packing: rows with images are not packed"):
        made(llava, tmp_path, data={"train": str(tmp_path / "rows.jsonl"), "packing": True})
