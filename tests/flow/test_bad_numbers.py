"""A gradient that is not finite, met by ``smidgen train``: what is told, how it ends, what is saved."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smidgen.cli.main import main
from smidgen.training import proof
from smidgen.training.loop import Loop
from tests.training.conftest import write_recipe


def train(folder: Path, monkeypatch: pytest.MonkeyPatch, bad: range) -> int:
    """Train with infinite gradients below a module of the first layer in the steps of `bad`; answer the exit code."""
    update = Loop._update

    def spoiled(self: Loop, rows: list[int]) -> None:
        def spoil(module, inputs, output):
            if output.requires_grad and step in bad:
                output.register_hook(lambda gradient: gradient * torch.inf)

        step = self.step + 1
        hook = self.model.get_submodule("model.layers.0.mlp.down_proj").register_forward_hook(spoil)
        update(self, rows)
        hook.remove()

    monkeypatch.setattr(Loop, "_update", spoiled)
    monkeypatch.setattr(proof, "verify_afresh", lambda folder: [])  # takes seconds
    monkeypatch.setenv("SMIDGEN_CACHE", str(folder / "cache"))
    monkeypatch.setattr(sys, "argv", ["smidgen", "train", str(write_recipe(folder, save_steps=1, max_steps=9))])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def finite(folder: Path) -> list[bool]:
    """For each file of tensors below a folder, whether all numbers in it are finite."""
    return [
        all(tensor.isfinite().all() for tensor in load_file(path).values() if tensor.is_floating_point())
        for path in sorted(folder.rglob("*.safetensors"))
    ]


def test_one_bad_batch_is_named_and_left_out(tmp_path, monkeypatch, capsys):
    assert train(tmp_path, monkeypatch, range(5, 6)) == 0
    told = " ".join(capsys.readouterr().out.split())
    rows = f"rows {tmp_path / 'rows.jsonl'}:"
    assert f"step 5: non-finite gradient (first: model.layers.0.mlp.down_proj); {rows}" in told
    assert "skipped (1/3)" in told and "skipped (2/3)" not in told
    assert (tmp_path / "run" / "adapter").is_dir()
    saved = finite(tmp_path / "run")
    assert len(saved) > 9 and all(saved)


def test_three_bad_batches_in_a_row_end_the_run_and_the_last_good_weights_stay(tmp_path, monkeypatch, capsys):
    assert train(tmp_path, monkeypatch, range(5, 9)) == 3
    told = capsys.readouterr()
    for number in (1, 2, 3):
        assert f"skipped ({number}/3)" in " ".join(told.out.split()) + told.err
    assert "stopped after 3 bad updates in a row; last good checkpoint: " in told.err
    assert f"{Path('checkpoints', 'step-4')}" in told.err
    assert not (tmp_path / "run" / "adapter").exists()
    saved = finite(tmp_path / "run")
    assert saved and all(saved)
