"""Layers that bitsandbytes has loaded, before and after it is called."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from smidgen.errors import ModelError
from smidgen.quant import dense, packed_of, quantize
from smidgen.quant.from_bitsandbytes import _row_major
from tests.quant.conftest import DTYPES, weights


def four_bits(bnb, kind="nf4", double=True, dtype=torch.bfloat16, rows=96, columns=128, **options) -> nn.Module:
    layer = bnb.nn.Linear4bit(columns, rows, bias=False, quant_type=kind, compress_statistics=double, **options)
    layer.weight = bnb.nn.Params4bit(
        weights(rows, columns, dtype), requires_grad=False, quant_type=kind, compress_statistics=double, module=layer
    )
    return layer.to("cpu")


def int8(bnb, rows=96, columns=64) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weights(rows, columns, torch.float16), requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu")


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_four_bits_share_their_memory(bnb, kind, double, dtype):
    layer = four_bits(bnb, kind, double, dtype)
    packed = packed_of(layer)
    assert packed is not None
    assert packed.codes.data_ptr() == layer.weight.data_ptr()
    assert packed.scales.data_ptr() == layer.weight.quant_state.absmax.data_ptr()
    assert type(packed.codes) is torch.Tensor
    assert packed.dtype == dtype
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(dense(packed), expected)
    assert torch.equal(dense(packed), dense(quantize(weights(96, 128, dtype), kind, double=double)))


def test_the_dtype_is_what_the_layer_computes_in(bnb):
    layer = four_bits(bnb, compute_dtype=torch.float32)
    for wanted, expected in ((None, torch.float32), (torch.float16, torch.float16)):
        packed = packed_of(layer, wanted)
        assert packed is not None and packed.dtype == expected


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_four_bits_after_a_call_in_eval_mode(bnb, kind, double):
    """Codes as before; scales to the nearest bfloat16, if bitsandbytes laid them out anew; and the layer's answer."""
    layer = four_bits(bnb, kind, double, torch.float32).eval()
    before = packed_of(layer)
    assert before is not None
    codes, weight = before.codes.clone(), dense(before)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    answer = layer(x)
    after = packed_of(layer)
    assert after is not None
    assert torch.equal(after.codes, codes)
    largest = weight.view(-1, 64).abs().amax(1, keepdim=True)
    assert ((dense(after) - weight).view(-1, 64).abs() <= largest * 2**-8).all()
    assert torch.allclose(functional.linear(x, dense(after)), answer, rtol=0.02, atol=0.02 * float(answer.abs().max()))
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        assert torch.equal(after.scales, after.scales.bfloat16().float())
        assert not torch.equal(layer.weight.data.view(-1), codes)


@pytest.mark.parametrize("shape", [(32, 2), (64, 64), (96, 130)])
def test_the_layout_for_avx512_is_undone(bnb, shape):
    codes, state = bnb.functional.quantize_4bit(weights(shape[0], 64), quant_type="nf4")
    codes = torch.randint(0, 256, (shape[0] * shape[1] // 2, 1), dtype=torch.uint8)
    state.shape, state.absmax, state.blocksize = torch.Size(shape), torch.ones(shape[0]), shape[1]
    anew, _ = bnb.functional._convert_weight_packed_for_cpu(codes, state)
    assert torch.equal(_row_major(anew).view(-1, 1), codes)


def test_int8_before_and_after_its_first_call(bnb):
    layer = int8(bnb)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    expected = dense(quantize(weights(96, 64, torch.float16), "int8", compute_dtype=torch.float32))
    for call in range(3):
        packed = packed_of(layer)
        assert packed is not None
        assert packed.codes.data_ptr() == layer.weight.data_ptr()
        assert packed.dtype == torch.float32
        assert torch.equal(dense(packed), expected)
        answer = layer.train(call == 0)(x)
        assert torch.allclose(functional.linear(x, dense(packed)), answer, atol=0.05 * float(answer.abs().max()))
    half = packed_of(layer, torch.float16)
    assert half is not None and dense(half).dtype == torch.float16


def test_other_layers_have_none(bnb):
    assert packed_of(nn.Linear(2, 3)) is None
    assert packed_of(type("Linear4bit", (nn.Linear,), {})(2, 3)) is None
    assert packed_of(bnb.nn.Linear8bitLt(4, 4)) is None  # its weight is a plain one


def test_a_class_made_of_it_counts(bnb):
    layer = int8(bnb)
    layer.__class__ = type("Adapted", (type(layer),), {})
    assert packed_of(layer) is not None


def test_what_is_not_quantised_yet_is_refused(bnb):
    for layer in (bnb.nn.Linear4bit(64, 64), bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)):
        with pytest.raises(ModelError, match="has not quantised its weight yet; move the model to its device"):
            packed_of(layer)


def test_a_transposed_weight_is_refused(bnb):
    layer = four_bits(bnb)
    layer.in_features, layer.out_features = 96, 128
    with pytest.raises(ModelError, match=r"quantised as \(96, 128\); quantise it as \(outputs, inputs\)"):
        packed_of(layer)
