"""The 8-bit code book and the nearest codes, against all codes tried out and against bitsandbytes."""

from __future__ import annotations

import pytest
import torch

from smidgen.quant.codes import dynamic_book
from smidgen.recipe import TrainRecipe
from smidgen.training.optimizers import make_optimizer
from smidgen.training.optimizers.blockwise import BLOCK, dequantise, quantise
from smidgen.training.optimizers.on_cuda import from_bitsandbytes
from smidgen.training.optimizers.states import layout_of
from tests.conftest import tiny_llama
from tests.training.optimizers.test_laws import nearest

both = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
NUMBERS = 5 * BLOCK + 77


@both
def test_the_code_book_is_the_papers(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_book(signed), functional.create_dynamic_map(signed))


def numbers(signed: bool) -> torch.Tensor:
    """Numbers of many sizes, a block of zeros, and the bounds between codes from both sides."""
    torch.manual_seed(2)
    x = torch.randn(NUMBERS) * 10 ** (-8 * torch.rand(NUMBERS))
    x[BLOCK : 2 * BLOCK] = 0
    code = dynamic_book(signed)
    bounds = (code[1:] + code[:-1]) / 2
    x[2 * BLOCK : 3 * BLOCK] = torch.cat([torch.nextafter(bounds, torch.full((), 9.0)), torch.ones(1)])
    x[3 * BLOCK : 4 * BLOCK] = torch.cat([torch.nextafter(bounds, torch.full((), -9.0)), torch.ones(1)])
    return x if signed else x.abs()


@both
def test_every_code_is_the_nearest(signed):
    x = numbers(signed)
    codes, absmax = quantise(x, signed)
    assert (codes.shape, codes.dtype, absmax.shape) == ((NUMBERS,), torch.uint8, (6,))
    found = dequantise(codes, absmax, signed)
    torch.testing.assert_close(found.double(), nearest(x.double(), signed), rtol=1e-6, atol=0)
    assert not found[BLOCK : 2 * BLOCK].any()


@both
def test_what_was_read_is_stored_as_it_was(signed):
    codes, absmax = quantise(numbers(signed), signed)
    codes[BLOCK : 2 * BLOCK] = 0
    again, same = quantise(dequantise(codes, absmax, signed), signed)
    kept = (absmax == same).repeat_interleave(BLOCK)[:NUMBERS]  # not where the largest is negative: -1 is no code
    kept[BLOCK : 2 * BLOCK] = False
    assert kept.sum() > 2 * BLOCK and torch.equal(codes[kept], again[kept])


@pytest.mark.parametrize("optim", ["adamw_8bit", "lion_8bit"])
def test_steps_are_those_of_bitsandbytes(optim, tmp_path):
    """Its CPU code misses the nearest code for some numbers in a hundred, so it gets our states after each step."""
    pytest.importorskip("bitsandbytes")
    train = TrainRecipe(optim=optim, learning_rate=1e-2, weight_decay=0.1)
    ours = make_optimizer(tiny_llama(hidden_size=64, intermediate_size=132), train, tmp_path)
    model = tiny_llama(hidden_size=64, intermediate_size=132)
    groups = make_optimizer(model, train, tmp_path).param_groups
    layout = layout_of(model, optim)
    theirs = from_bitsandbytes(
        [{key: group[key] for key in ("params", "names", "weight_decay")} for group in groups], 1e-2, optim, layout
    )
    theirs.layout = layout
    torch.manual_seed(5)
    for _ in range(4):
        for name, parameter in ours.named.items():
            parameter.grad = torch.randn_like(parameter) * 0.01
            theirs.named[name].grad = parameter.grad.clone()
        ours.step()
        theirs.step()
        for name, parameter in ours.named.items():
            torch.testing.assert_close(theirs.named[name], parameter, rtol=1e-5, atol=1e-7, msg=name)
        mine, found = ours.tensors(), theirs.tensors()
        assert mine.keys() == found.keys()
        for key, state in mine.items():
            if state.dtype == torch.uint8:
                assert (state == found[key]).float().mean() > 0.95, key
            else:
                torch.testing.assert_close(found[key], state, rtol=1e-5, atol=1e-6 * float(state.abs().max()), msg=key)
        theirs.restore(mine)
        restored = theirs.tensors()
        assert all(torch.equal(restored[key], state) for key, state in mine.items())
