"""Who came from whom, and whether the files are still those that were recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from smidgen.cli.lineage import draw
from smidgen.cli.main import main
from smidgen.errors import UsageError
from smidgen.models.lineage import read_lineage
from smidgen.recipe import load_recipe
from smidgen.training import proof as proof_module
from smidgen.training.run import train
from tests.training.conftest import write_recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run `run`, `second` from its adapter, `merged` of that, and `full` from the merged model."""
    folder = tmp_path_factory.mktemp("lineage")
    path = write_recipe(folder, max_steps=2, save_steps=1)
    full = [f"model={folder / 'merged'}", "adapter={method: full}", f"output={folder / 'full'}"]

    def carry_out(*overrides: str, **options: Path) -> None:
        train(load_recipe(path, overrides)[0], say=lambda line: None, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMIDGEN_CACHE", str(folder / "cache"))
        patch.setattr(proof_module, "verify_afresh", lambda _: [])
        carry_out()
        carry_out(f"output={folder / 'second'}", "train.optim=lion", init_adapter=folder / "run")  # by the run's name
        smidgen(patch, "merge", folder / "second", folder / "merged")
        carry_out(*full)
    return folder


def smidgen(patch: pytest.MonkeyPatch, *arguments: object) -> int:
    patch.setattr("sys.argv", ["smidgen", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture
def copy(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All of it in another place, which names relative to each other allow."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_tree_and_what_changed(copy: Path):
    root = read_lineage(Path("full"))
    lines = list(draw(root))
    bare = [line.lstrip("│├└─ ") for line in lines]
    assert [line for line in bare if " of " in line] == ["model of merged", "adapter of second", "adapter of run"]
    assert lines[0] == "full" and 'changed: train.optim: "adamw" -> "lion"' in bare
    assert not [line for line in bare if line.startswith(("FAIL", "changed: output"))]
    assert [node.kind for node in (root, root.parents[0], root.parents[0].parents[0])] == ["run", "merged model", "run"]
    adapter = list(draw(read_lineage(Path("second/adapter"))))
    assert adapter[0] == "second" and adapter[1:] == [line[6:] for line in lines if line.startswith("      ")]
    assert len(root.all_checks()) == 17


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            "run/adapter/adapter_model.safetensors",
            ["parent: run/adapter/{} changed since", "saved: run/adapter/{} c"],
        ),
        ("second/adapter/adapter_config.json", ["parent: second/adapter/{} changed since", "saved: second/adapter/"]),
        ("merged/model.safetensors", ["saved: merged/{} changed since"]),
        ("rows.jsonl", ["data: rows.jsonl changed since"]),
        ("run/recipe.yaml", ["recipe: run/recipe.yaml changed since"]),
        ("run", ["folder: run/adapter is missing"]),
    ],
)
@pytest.mark.parametrize("gone", [False, True])
def test_what_is_no_longer_so_is_told(copy: Path, capsys, monkeypatch: pytest.MonkeyPatch, change, told, gone):
    path = copy / change
    if path.is_dir():
        shutil.rmtree(path)
    elif gone:
        path.unlink()
    else:
        path.write_text(path.read_text(encoding="utf-8", errors="replace").replace("seed: 42", "seed: 43") + "\n")
    assert smidgen(monkeypatch, "lineage", "full") == 1
    shown = capsys.readouterr().out
    for line in told:
        wanted = line.format(path.name)
        assert f"FAIL {wanted.replace('changed since', 'is missing') if gone else wanted}"[:50] in shown
    assert smidgen(monkeypatch, "lineage", "full", "--json") == 1
    tree = json.loads(capsys.readouterr().out)
    assert tree["folder"] == "full" and tree["parents"][0]["parents"][0]["folder"] == "second"


def test_another_model_in_the_place_of_a_parent_is_told(copy: Path):
    record = json.loads((copy / "merged" / "record.json").read_text())
    record["fingerprint"] = "0" * 16 + record["fingerprint"][16:].replace("3", "4")
    (copy / "merged" / "record.json").write_text(json.dumps(record))
    bad = [check.text for check in read_lineage(Path("full")).all_checks() if not check.passed]
    assert bad == ["parent: merged holds other weights than those that full started from"]


def test_what_has_no_lineage_is_told(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    for folder, told in (("nowhere", "no such folder"), ("base", "holds no record.json")):
        with pytest.raises(UsageError, match=told):
            read_lineage(Path(folder))
    assert smidgen(monkeypatch, "verify", "merged") == 2
    assert "is a merged model; verify the run that it came from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lineage", "told"),
    [
        ({}, "holds no lineage that can be read: fields are missing"),
        ({"parents": 3, "recipe": None, "data": {}}, "lineage.parents must be a list, got 3"),
        ({"parents": [{"role": "adapter", "folder": "//there/x", "files": {}}], "recipe": None, "data": {}}, "network"),
        (
            {"parents": [{"role": "adapter", "folder": ".", "files": {}}], "recipe": None, "data": {}},
            "lead back to its",
        ),
    ],
)
def test_a_made_up_record_is_refused(tmp_path: Path, lineage, told):
    (tmp_path / "record.json").write_text(json.dumps({"lineage": lineage}))
    with pytest.raises(UsageError, match=told):
        read_lineage(tmp_path)


def test_a_run_goes_on_only_from_the_adapter_it_started_from(copy: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SMIDGEN_CACHE", str(copy / "cache"))
    monkeypatch.setattr(proof_module, "verify_afresh", lambda _: [])
    other = copy / "run" / "adapter"
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    recipe, _ = load_recipe(copy / "second" / "recipe.yaml", ["output=second"])
    with pytest.raises(UsageError, match="cannot resume: the adapter that it started from changed"):
        train(recipe, resume=True, init_adapter=Path("run"), say=lambda line: None)
