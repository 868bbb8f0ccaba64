"""Weights of mapped files: copied where they must be, and their pages let go of."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from smidgen.models.mapped import MappedFiles, own_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped")


def resident(path: Path) -> int:
    """KiB of a file that are in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        inside = line.rstrip().endswith(str(path)) if "-" in line.split()[0] else inside
        total += int(line.split()[1]) if inside and line.startswith("Rss:") else 0
    return total


def test_pages_are_let_go_of_and_come_back_unchanged(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(2**18).float(), "b": torch.ones(2**18)}, path)
    with safe_open(path, "pt") as file:
        a, b = file.get_tensor("a"), file.get_tensor("b")
    files = MappedFiles()
    if not files.hold(a):
        pytest.skip("this safetensors reads files whole")
    assert not files.hold(torch.ones(4))
    assert a.sum() > 0 and b.sum() == 2**18
    before = resident(path)
    files.let_go(a)
    assert before - resident(path) > 900  # of 1,024; b stays
    assert torch.equal(a, torch.arange(2**18).float())


def test_a_model_gets_memory_of_its_own(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.randn(64, 64)}, path)
    model = torch.nn.Linear(64, 64, bias=False)
    with safe_open(path, "pt") as file:
        model.weight.data = file.get_tensor("weight")
    expected = model.weight.detach().clone()
    own_memory(model)
    assert not MappedFiles().hold(model.weight)
    assert torch.equal(model.weight, expected)
