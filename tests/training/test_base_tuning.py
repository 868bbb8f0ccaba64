"""Which base parameters full and freeze tuning train."""

from __future__ import annotations

import pytest

from smidgen.adapters.methods.full import Freeze, FreezeConfig, Full, FullConfig, layer_list
from smidgen.errors import TargetError
from tests.conftest import tiny_gpt2, tiny_llama, toy


def test_full_tuning_names_every_parameter_and_a_tied_one_once():
    names = Full.select(tiny_llama(tied=True), FullConfig())
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    assert len(Full.select(tiny_llama(), FullConfig())) == len(names) + 1


@pytest.mark.parametrize(("make", "layer"), [(tiny_llama, "model.layers.1."), (tiny_gpt2, "transformer.h.1.")])
def test_freeze_tuning_names_the_last_layers(make, layer):
    model = make()
    names = Freeze.select(model, FreezeConfig(num_layers=1))
    assert names == [name for name, _ in model.named_parameters() if name.startswith(layer)]


def test_freeze_tuning_takes_further_modules_by_the_end_of_their_path():
    names = Freeze.select(tiny_llama(tied=True), FreezeConfig(num_layers=0, modules=["norm", "lm_head"]))
    assert names == ["model.embed_tokens.weight", "model.norm.weight"]


def test_freeze_tuning_reports_all_mistakes_at_once():
    with pytest.raises(TargetError) as error:
        Freeze.select(tiny_llama(), FreezeConfig(num_layers=3, modules=["lm_haed"]))
    assert "3 asked for, 'model.layers' has 2 layers" in str(error.value)
    assert "no module is called 'lm_haed'; did you mean 'lm_head'?" in str(error.value)


def test_a_model_without_layers_is_refused():
    with pytest.raises(TargetError, match="Toy has no list of layers"):
        layer_list(toy())
