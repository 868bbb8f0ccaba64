"""The proof made again from the files of a run; each kind of damage fails the check that is there for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smidgen.errors import UsageError
from smidgen.export import verify as verify_module
from smidgen.export.verify import verify
from smidgen.proofs import Check
from smidgen.recipe import load_recipe
from smidgen.training import proof
from smidgen.training.run import train
from tests.training.conftest import save_tiny_model, write_recipe

ADAPTER_CHECKS = ["base", "keys", "acts", "off", "reload", "template", "stop", "merge"]


def _quiet(line: str) -> None:
    """Nothing is said."""


def _train(folder: Path, *overrides: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "verify_afresh", lambda _: [])
        patch.setenv("SMIDGEN_CACHE", str(folder / "cache"))
        train(load_recipe(write_recipe(folder), overrides)[0], say=_quiet)
    return folder / "run"


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _train(tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _train(tmp_path_factory.mktemp("full"), "adapter={method: full}", "train.learning_rate=0.003")


@pytest.fixture
def run(adapter_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter_run, tmp_path / "moved" / "run"))


def _failed(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if not check.passed]


def _edit(path: Path, change: Callable[[dict], None]) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def test_every_claim_about_an_adapter_is_found_again_in_a_folder_that_was_moved(run: Path) -> None:
    checks = verify(run, say=_quiet)
    assert [check.name for check in checks] == ADAPTER_CHECKS
    assert not _failed(checks), [check.text for check in checks]
    told = "\n".join(check.text for check in checks)
    assert "keys: 28/28 tensors fit the model, all finite" in told
    assert "adapter acts on 14/14 weights" in told
    assert "adapter off: logits of 4 rows equal the base to the bit" in told
    assert "reload: loss of 4 rows equal to the bit" in told
    assert "template: 5/5 conversations identical" in told
    assert "stop tokens: </s> (2)" in told
    assert "merge in float32: parity on 8 prompts" in told


def test_every_claim_about_a_tuned_model_is_found_again(full_run: Path) -> None:
    checks = verify(full_run, say=_quiet)
    assert [check.name for check in checks] == ["weights", "reload", "template", "stop", "moved"]
    assert not _failed(checks), [check.text for check in checks]


def test_a_tuned_model_with_a_damaged_value_is_found(full_run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(full_run, tmp_path / "run"))
    path = copy / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = torch.inf
    save_file(tensors, path, metadata={"format": "pt"})
    assert "weights" in _failed(verify(copy, say=_quiet))


def _scale(tensors: dict[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        if "lora_B" in key:
            tensor *= 1.01


def _still(tensors: dict[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        if "lora_B" in key:
            tensor.zero_()


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(iter(tensors))]


def _spoil(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("damage", "failed", "told"),
    [
        (_scale, "reload", "largest difference"),
        (_still, "acts", "acts on 0/14 weights"),
        (_drop, "keys", "1 missing"),
        (_spoil, "keys", "not finite"),
    ],
)
def test_damage_to_the_adapter_file_is_found(
    run: Path, damage: Callable[[dict[str, torch.Tensor]], None], failed: str, told: str
) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    tensors, metadata = load_file(path), verify_module.read_adapter(path.parent)[1]
    damage(tensors)
    save_file(tensors, path, metadata={"format": "pt", "smidgen": json.dumps(metadata)})
    checks = {check.name: check for check in verify(run, say=_quiet)}
    assert not checks[failed].passed
    assert told in checks[failed].text


def test_another_base_is_found(run: Path, tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "other")
    tensors = load_file(base / "model.safetensors")
    save_file({key: tensor * 1.5 for key, tensor in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    checks = {check.name: check for check in verify(run, base=str(base), say=_quiet)}
    assert not checks["base"].passed and "but it was trained on" in checks["base"].text
    assert checks["keys"].passed and checks["off"].passed and not checks["reload"].passed


def test_another_template_is_found(run: Path) -> None:
    (run / "adapter" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] }}{% endfor %}", encoding="utf-8"
    )
    (check,) = (check for check in verify(run, say=_quiet) if check.name == "template")
    assert not check.passed
    assert "template: 0/5 conversations identical; one question: differs at token" in check.text


def test_stop_tokens_that_were_not_saved_are_found(run: Path) -> None:
    _edit(run / "adapter" / "generation_config.json", lambda config: config.update(eos_token_id=[0]))
    (check,) = (check for check in verify(run, say=_quiet) if check.name == "stop")
    assert not check.passed and check.text == "stop tokens: </s> (2); not saved: [2]"


def test_a_folder_without_a_record_is_no_finished_run(run: Path) -> None:
    (run / "record.json").unlink()
    with pytest.raises(UsageError, match=r"holds no record\.json"):
        verify(run, say=_quiet)
