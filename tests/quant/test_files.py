"""Files both ways with bitsandbytes, and what files may not hold."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from smidgen.errors import ModelError
from smidgen.quant import KINDS, Packed, bits, dense, from_tensors, quantize, to_tensors
from tests.quant.conftest import DTYPES, weights

LAYER = "model.layers.0.mlp.up_proj"
WEIGHT = f"{LAYER}.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"
FEW = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def same(a: Packed, b: Packed) -> bool:
    fields = [a.kind == b.kind, a.shape == b.shape, a.dtype == b.dtype, a.block_size == b.block_size]
    tensors = [torch.equal(a.codes, b.codes), torch.equal(a.scales, b.scales), (a.nested is None) == (b.nested is None)]
    if a.nested and b.nested:
        tensors += [torch.equal(x, y) for x, y in zip(a.nested[:2], b.nested[:2])]
        tensors += [a.nested.offset == b.nested.offset]
    return all(fields + tensors)


@given(
    kind=st.sampled_from(KINDS),
    rows=st.sampled_from([1, 3, 64, 300]),
    columns=st.sampled_from([1, 63, 64, 130]),
    dtype=st.sampled_from(DTYPES),
    double=st.booleans(),
)
@FEW
def test_what_is_written_is_read_again(tmp_path, kind, rows, columns, dtype, double):
    packed = quantize(weights(rows, columns), kind, double=double and kind != "int8", compute_dtype=dtype)
    save_file(to_tensors(packed, LAYER), tmp_path / "model.safetensors")
    again = from_tensors(load_file(tmp_path / "model.safetensors"), LAYER, shape=(rows, columns), compute_dtype=dtype)
    assert same(packed, again)
    assert same(packed, from_tensors(to_tensors(packed, ""), "", compute_dtype=dtype))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_four_bit_files_are_those_of_bitsandbytes(bnb, kind, double, dtype):
    layer = bnb.nn.Linear4bit(130, 96, bias=False, quant_type=kind, compress_statistics=double)
    layer.weight = bnb.nn.Params4bit(
        weights(96, 130, dtype), requires_grad=False, quant_type=kind, compress_statistics=double, module=layer
    )
    theirs = layer.to("cpu").state_dict(prefix=f"{LAYER}.")
    packed = quantize(weights(96, 130, dtype), kind, double=double)
    ours = to_tensors(packed, LAYER)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert ours[key].shape == tensor.shape
        assert torch.equal(ours[key], tensor), key
    assert same(packed, from_tensors(theirs, LAYER))
    state = {key.removeprefix(f"{WEIGHT}."): tensor for key, tensor in ours.items() if key != WEIGHT}
    again = bnb.functional.QuantState.from_dict(state, device=torch.device("cpu"))
    assert torch.equal(dense(packed), bnb.functional.dequantize_4bit(ours[WEIGHT], again))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32, torch.int8])
def test_codes_may_be_stored_as_numbers_of_another_type(bnb, storage):
    weight = weights(8, 64)
    codes, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", quant_storage=storage)
    tensors = {WEIGHT: codes} | {f"{WEIGHT}.{key}": value for key, value in state.as_dict(packed=True).items()}
    assert same(quantize(weight, "nf4"), from_tensors(tensors, LAYER))


def test_int8_files_are_those_of_bitsandbytes(bnb):
    weight = weights(96, 64, torch.float16)
    layer = bnb.nn.Linear8bitLt(64, 96, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    theirs = layer.to("cpu").state_dict(prefix=f"{LAYER}.")
    packed = quantize(weight, "int8", compute_dtype=torch.float32)
    ours = to_tensors(packed, LAYER)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key], tensor), key
    assert same(packed, from_tensors(theirs, LAYER))
    assert torch.equal(dense(packed), bnb.functional.int8_vectorwise_dequant(layer.weight.data, packed.scales))


def test_nf4_with_double_quantisation_takes_little_more_than_4_bits(tmp_path):
    """In memory, and in a file with its header, for a layer of a small model."""
    packed = quantize(weights(1536, 576), "nf4", double=True)
    assert 4.12 < bits(packed) < 4.13
    save_file(to_tensors(packed, LAYER), tmp_path / "model.safetensors")
    assert 8 * (tmp_path / "model.safetensors").stat().st_size / (1536 * 576) < 4.2
    assert bits(quantize(weights(64, 64), "nf4")) == 4.5
    assert bits(quantize(weights(64, 64), "int8")) == 8.5


def changed(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({key: change(tensors[key])})


def field(**fields: object) -> Callable[[dict[str, Tensor]], None]:
    """Changes fields of the JSON; those of None are taken out."""

    def change(tensors: dict[str, Tensor]) -> None:
        state = json.loads(bytes(tensors[STATE].tolist())) | fields
        text = json.dumps({key: value for key, value in state.items() if value is not None})
        tensors[STATE] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


def first(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


HOSTILE = {
    "no weight": (lambda t: t.pop(WEIGHT), "up_proj.weight: there is no such tensor"),
    "no scales": (lambda t: t.pop(f"{WEIGHT}.absmax"), "weight.absmax: there is no such tensor"),
    "no inner scales": (lambda t: t.pop(f"{WEIGHT}.nested_absmax"), "nested_absmax: there is no such tensor"),
    "no inner book": (lambda t: t.pop(f"{WEIGHT}.nested_quant_map"), "nested_quant_map: there is no such tensor"),
    "no state": (lambda t: t.pop(STATE), "not stored in 4 or 8 bits: beside it stands no"),
    "two states": (lambda t: t.update({STATE[:-3] + "fp4": t[STATE]}), "beside it stands both"),
    "more": (lambda t: t.update({f"{WEIGHT}.offset": t[WEIGHT]}), "weight.offset: what is it"),
    "short codes": (changed(WEIGHT, lambda x: x[1:]), "weight: must be 65,536 numbers of torch.uint8"),
    "odd type": (changed(WEIGHT, lambda x: x.long()), "must be stored as one of .* got torch.int64"),
    "long scales": (changed(f"{WEIGHT}.absmax", lambda x: x.repeat(2)), "absmax: must be 2,048 numbers"),
    "plain scales": (changed(f"{WEIGHT}.absmax", lambda x: x.float()), "absmax: must be 2,048 numbers of torch.uint8"),
    "cast scales": (changed(f"{WEIGHT}.nested_absmax", lambda x: x.bfloat16()), "8 numbers of torch.float32"),
    "nan": (changed(f"{WEIGHT}.nested_absmax", first(float("nan"))), "nested_absmax: holds NaN"),
    "infinity": (changed(f"{WEIGHT}.nested_quant_map", first(float("inf"))), "nested_quant_map: holds NaN or inf"),
    "overflow": (changed(f"{WEIGHT}.nested_quant_map", lambda x: x * 3e38), "absmax: the scales are not finite"),
    "short book": (changed(f"{WEIGHT}.nested_quant_map", lambda x: x[:16]), "must be 256 numbers"),
    "other book": (changed(f"{WEIGHT}.quant_map", lambda x: x.flip(0)), "quant_map: is not the code book of nf4"),
    "long book": (changed(f"{WEIGHT}.quant_map", lambda x: x.repeat(16)), "quant_map: is not the code book"),
    "long state": (changed(STATE, lambda x: x.repeat(100)), "must be up to 4,096 bytes of JSON"),
    "no text": (changed(STATE, lambda x: x[:0]), "must be up to 4,096 bytes of JSON, got 0"),
    "state of floats": (changed(STATE, lambda x: x.float()), "bytes of JSON, got .* of torch.float32"),
    "no JSON": (changed(STATE, lambda x: x[:-1]), "not valid JSON"),
    "no UTF-8": (changed(STATE, first(255)), "not valid JSON"),
    "a list": (lambda t: t.update({STATE: torch.tensor(list(b"[1]"), dtype=torch.uint8)}), "must hold a JSON object"),
    "other kind": (field(quant_type="fp4"), "quant_type must be 'nf4', got 'fp4'"),
    "no kind": (field(quant_type=None), "quant_type must be 'nf4', got nothing"),
    "block of 48": (field(blocksize=48), "blocksize must be one of .* got 48"),
    "block of 0": (field(blocksize=0), "blocksize must be one of"),
    "true": (field(blocksize=True), "blocksize must be one of"),
    "code": (field(dtype="load"), "dtype must be one of float32, bfloat16, float16, got 'load'"),
    "list for a word": (field(dtype=["float32"]), "dtype must be one of"),
    "flat": (field(shape=[131072]), "shape must be two whole numbers"),
    "negative": (field(shape=[-512, -256]), "shape must be two whole numbers"),
    "fractions": (field(shape=[512.0, 256.0]), "shape must be two whole numbers"),
    "huge": (field(shape=[2**60, 2**60]), "weight: must be .* numbers of torch.uint8 for a weight"),
    "transposed": (field(shape=[256, 512]), r"is \(256, 512\) in the file, the layer is \(512, 256\)"),
    "inner block": (field(nested_blocksize=128), "nested_blocksize must be 256, got 128"),
    "inner type": (field(nested_dtype="float16"), "nested_dtype must be 'float32'"),
    "huge offset": (field(nested_offset=1e300), "nested_offset must be a finite number"),
    "nan offset": (field(nested_offset=float("nan")), "nested_offset must be a finite number|not valid JSON"),
    "text offset": (field(nested_offset="1"), "nested_offset must be a finite number"),
    "unknown": (field(trust="me"), "the field 'trust' is unknown"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_damaged_four_bit_files_are_refused(case):
    change, message = HOSTILE[case]
    tensors = to_tensors(quantize(weights(512, 256), "nf4", double=True), LAYER)
    change(tensors)
    with pytest.raises(ModelError, match=message) as error:
        from_tensors(tensors, LAYER, shape=(512, 256))
    assert LAYER in str(error.value)


HOSTILE_INT8 = {
    "codes": (changed(WEIGHT, lambda x: x.short()), "must be 640 numbers of torch.int8"),
    "flat": (changed(WEIGHT, lambda x: x.view(-1)), "must be a matrix"),
    "empty": (changed(WEIGHT, lambda x: x[:0]), "must be a matrix"),
    "scales": (changed(f"{LAYER}.SCB", lambda x: x[1:]), "SCB: must be 10 numbers of torch.float32"),
    "cast": (changed(f"{LAYER}.SCB", lambda x: x.half()), "SCB: must be 10 numbers of torch.float32"),
    "nan": (changed(f"{LAYER}.SCB", first(float("nan"))), "SCB: holds NaN or infinity"),
    "layout": (changed(f"{LAYER}.weight_format", lambda x: x + 3), "weight_format: must be 0"),
    "shape": (changed(WEIGHT, lambda x: x.view(10, 4, 16).flatten(1)[:, :32].repeat(1, 2)[:, :60]), "of another model"),
}


@pytest.mark.parametrize("case", HOSTILE_INT8)
def test_damaged_int8_files_are_refused(case):
    change, message = HOSTILE_INT8[case]
    tensors = to_tensors(quantize(weights(10, 64), "int8"), LAYER)
    change(tensors)
    with pytest.raises(ModelError, match=message) as error:
        from_tensors(tensors, LAYER, shape=(10, 64))
    assert LAYER in str(error.value)
