"""``smidgen bench``: what it prints, on sizes that take a moment."""

from __future__ import annotations

import json
import os

import pytest

from smidgen import kernels
from tests.cli.test_use import smidgen
from tests.training.conftest import save_tiny_model

TINY = ("--rows", "1", "--length", "8", "--repeat", "1")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("bench") / "base")


def test_json_holds_what_was_chosen_and_measured(base, monkeypatch, capsys):
    before = os.environ.get("SMIDGEN_KERNELS", "")
    assert smidgen(monkeypatch, "bench", "--model", base, *TINY, "--dropout", "0.5", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert os.environ.get("SMIDGEN_KERNELS", "") == before
    assert (found["rows"], found["length"], found["dropout"], found["repeat"]) == (1, 8, 0.5, 1)
    assert found["model"] == str(base) and found["product_flops"] > 1e8
    variants = found["variants"]
    assert {"plain"} <= set(variants) <= {"peft", "plain", "smidgen"}
    assert ("smidgen" in variants) == (kernels.instruction_set() != "reference")
    for one in variants.values():
        limit = 4 * found["parameters"] * one["tokens_per_second"] / found["product_flops"]
        assert one["share"] == pytest.approx(limit)
        assert one["first_loss"] == pytest.approx(variants["plain"]["first_loss"], rel=0.02)
    assert any(line.startswith("threads: ") for line in found["told"])
    assert any(line.startswith("kernels: ") for line in found["told"])


def test_the_table_names_the_variants_and_the_random_model(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # as where peft is not installed
    assert smidgen(monkeypatch, "bench", *TINY) == 0
    told = capsys.readouterr().out
    assert "model: random llama, 6 layers, 26.0 million parameters" in told
    assert "plain " in told and "peft " not in told


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rows", "0"), "--rows"),
        (("--length", "1"), "--length"),
        (("--dropout", "1"), "--dropout"),
        (("--repeat", "0"), "--repeat"),
        (("--length", "8193"), "--length: 8193 tokens, but the model takes 8192"),
        (("--model", "no/such/model"), "no/such/model"),
    ],
)
def test_bad_options_are_told(options, words, monkeypatch, capsys):
    assert smidgen(monkeypatch, "bench", *options) == 2
    assert words in capsys.readouterr().err
