"""The halves of a decoder block against the same made of plain operations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from smidgen import kernels
from smidgen.kernels import LowRank
from smidgen.kernels.attention import Scores, attention_reference
from smidgen.kernels.block import Attention, FeedForward, Where, add_attention, add_feed_forward, autocasted, takes
from smidgen.kernels.gated import gated_reference
from smidgen.kernels.lora import Linear
from smidgen.kernels.norms import Norm, rms_norm_reference
from smidgen.kernels.rope import rope_reference
from tests.kernels.conftest import check, outputs_and_gradients, random
from tests.kernels.test_products import peft_linear

FEW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
HEADS, KV_HEADS, HEAD, WIDTH, INNER = 4, 2, 8, 24, 40


def normed(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else rms_norm_reference(x, norm.weight, norm.eps, norm.offset, norm.cast_first)


def made(x: Tensor, layers: tuple[Linear, ...], widths: list[int]) -> list[Tensor]:
    """The outputs of several layers, or the slices of one's."""
    if len(layers) > 1:
        return [peft_linear(x, *layer) for layer in layers]
    (layer,) = layers
    y = peft_linear(x, layer.weight, layer.bias, [])
    for update in layer.updates:
        part = slice(update.first, update.first + len(update.b))
        more = peft_linear(x, torch.zeros_like(layer.weight[part]), None, [update])
        y = torch.cat([y[:, : part.start], y[:, part] + more, y[:, part.stop :]], dim=1)
    return list(y.split(widths, dim=1))


def plain_attention(x: Tensor, part: Attention, where: Where) -> Tensor:
    widths = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD]
    q, k, v = (y.unflatten(1, (-1, HEAD)) for y in made(normed(x, part.norm), part.inputs, widths))
    q, k = (rope_reference(normed(y, n), where.cos, where.sin) for y, n in ((q, part.query_norm), (k, part.key_norm)))
    out, _ = attention_reference(q, k, v, where.offsets, *part.scores)
    return x + normed(peft_linear(out.flatten(1), *part.mix), part.norm_after)


def plain_feed_forward(x: Tensor, part: FeedForward) -> Tensor:
    gate, up = made(normed(x, part.norm), part.inputs, [INNER, INNER])
    return x + normed(peft_linear(gated_reference(gate, up, part.activation), *part.mix), part.norm_after)


class Tensors:
    """Hands out the inputs one by one, so that a part can be built of any set of them."""

    def __init__(self, given: list[Tensor] | None, dtype: torch.dtype = torch.float32):
        self.given, self.dtype, self.made = iter(given or []), dtype, []
        self.making = given is None

    def __call__(self, *shape: int, narrow: bool = True) -> Tensor:
        if not self.making:
            return next(self.given)
        x = random(*shape, seed=len(self.made)) / shape[-1] ** 0.5
        self.made.append(x.to(self.dtype) if narrow else x)
        return self.made[-1]

    def linear(self, outputs: int, inputs: int, p: float, bias: bool, slices: tuple[int, ...] = (0,)) -> Linear:
        """With one update for each slice of the outputs."""
        ends = (*slices[1:], outputs)
        weight, beside = self(outputs, inputs), self(outputs) if bias else None
        updates = []
        for i, (first, end) in enumerate(zip(slices, ends)):
            a, b = self(3, inputs, narrow=False), self(end - first, 3, narrow=False)
            updates.append(LowRank(a, b, 0.7, p, i + 5, first))
        return Linear(weight, beside, tuple(updates))

    def norm(self, width: int) -> Norm:
        return Norm(self(width), None, 1e-5)


SHAPES = dict(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    p=st.sampled_from([0.0, 0.3]),
    joined=st.booleans(),
    more_norms=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)


def native_only(kernel_set: str) -> None:
    if kernel_set == "reference":
        pytest.skip("whole blocks are native alone; the model's own layers run otherwise")


@given(**SHAPES)
@FEW
def test_add_attention(kernel_set, lengths, p, joined, more_norms, bias, dtype):
    native_only(kernel_set)
    rows = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    angles = random(rows, HEAD // 2, seed=3)
    few, many = KV_HEADS * HEAD, (HEADS + 2 * KV_HEADS) * HEAD

    def part(new: Tensors) -> Attention:
        slices = (0, HEADS * HEAD, HEADS * HEAD + few)
        parts = [new.linear(n, WIDTH, p, bias) for n in ([] if joined else [HEADS * HEAD, few, few])]
        return Attention(
            norm=new.norm(WIDTH),
            inputs=tuple(parts) or (new.linear(many, WIDTH, p, bias, slices),),
            query_norm=new.norm(HEAD) if more_norms else None,
            key_norm=new.norm(HEAD) if more_norms else None,
            mix=new.linear(WIDTH, HEADS * HEAD, p, bias),
            norm_after=new.norm(WIDTH) if more_norms else None,
            kv_heads=KV_HEADS,
            head_width=HEAD,
            scores=Scores(HEAD**-0.5, None, None),
        )

    def where(x: Tensor) -> Where:
        return Where(offsets, angles.cos().to(x.dtype), angles.sin().to(x.dtype))

    new = Tensors(None, dtype)
    part(new)
    check(
        lambda x, *given: add_attention(x, part(Tensors(list(given))), where(x)),
        lambda x, *given: plain_attention(x, part(Tensors(list(given))), where(x)),
        [random(rows, WIDTH, dtype=dtype), *new.made],
        float32_error=1e-5,
        factor=1.5,
        slack=10,  # each half rounds about ten times
    )


@given(**SHAPES, frugal=st.booleans())
@FEW
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_add_feed_forward(kernel_set, activation, lengths, p, joined, more_norms, bias, frugal, dtype):
    native_only(kernel_set)

    def part(new: Tensors) -> FeedForward:
        parts = [new.linear(INNER, WIDTH, p, bias) for _ in ([] if joined else range(2))]
        return FeedForward(
            norm=new.norm(WIDTH),
            inputs=tuple(parts) or (new.linear(2 * INNER, WIDTH, p, bias, (0, INNER)),),
            mix=new.linear(WIDTH, INNER, p, bias),
            norm_after=new.norm(WIDTH) if more_norms else None,
            activation=activation,
        )

    new = Tensors(None, dtype)
    part(new)
    check(
        lambda x, *given: add_feed_forward(x, part(Tensors(list(given))), frugal),
        lambda x, *given: plain_feed_forward(x, part(Tensors(list(given)))),
        [random(sum(lengths), WIDTH, dtype=dtype), *new.made],
        float32_error=1e-5,
        factor=1.5,
        slack=10,  # each half rounds about ten times
    )


def test_what_is_kept_does_not_change_the_gradients(kernel_set):
    """To the bit: what was not kept is made again as it was."""
    native_only(kernel_set)
    new = Tensors(None, torch.bfloat16)

    def part(new: Tensors) -> FeedForward:
        norm, gates = new.norm(WIDTH), new.linear(2 * INNER, WIDTH, 0.3, True, (0, INNER))
        return FeedForward(norm, (gates,), new.linear(WIDTH, INNER, 0.3, False), None, "silu")

    part(new)

    def run(frugal: bool) -> list[Tensor]:
        def half(x: Tensor, *given: Tensor) -> Tensor:
            return add_feed_forward(x, part(Tensors(list(given))), frugal)

        return outputs_and_gradients(half, [random(50, WIDTH, dtype=torch.bfloat16), *new.made], 1)

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def test_unlike_types_are_not_taken():
    new = Tensors(None)
    part = FeedForward(
        new.norm(WIDTH), (new.linear(2 * INNER, WIDTH, 0, False),), new.linear(WIDTH, INNER, 0, False), None, "silu"
    )
    native = kernels.instruction_set() != "reference"
    assert takes(random(4, WIDTH), part) is native
    assert not takes(random(4, WIDTH, dtype=torch.bfloat16), part)
    with torch.autocast("cpu", torch.bfloat16):
        cast = autocasted(part._replace(mix=new.linear(WIDTH, INNER, 0, False)))
    assert takes(random(4, WIDTH, dtype=torch.bfloat16), cast) is native
    assert {cast.norm.weight.dtype, cast.mix.weight.dtype} == {torch.bfloat16}
    assert cast.mix.updates[0].a.dtype == torch.float32
