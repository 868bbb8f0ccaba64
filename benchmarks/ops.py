"""Each operation of smidgen.kernels beside plain PyTorch: milliseconds of forward and backward.

Both run in turns in one process; the median of each is printed, and the fastest run. Shapes are those of SmolLM2-135M
at 4 rows of 512 tokens.

    python benchmarks/ops.py [--repeat 15] [--dtype bfloat16] [--only attention]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from smidgen import kernels

TOKENS, WIDTH, WIDE, VOCABULARY, HEADS, KV_HEADS, HEAD = 2048, 576, 1536, 49_152, 9, 3, 64


@dataclass
class Case:
    """One operation: two ways to compute it, from the same inputs."""

    name: str
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: list[Tensor]
    frozen: list[Tensor] = field(default_factory=list)  # inputs without gradient, after the others


def timed(function: Callable[..., Tensor], case: Case) -> float:
    """Milliseconds of forward and backward."""
    inputs = [x.detach().requires_grad_() for x in case.inputs]
    start = time.perf_counter()
    y = function(*inputs, *case.frozen)
    middle = time.perf_counter()
    grad = torch.ones_like(y)
    again = time.perf_counter()
    y.backward(grad)
    return (time.perf_counter() - again + middle - start) * 1e3


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """All operations, on random inputs."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    x, weight = random(TOKENS, WIDTH), random(WIDTH)
    yield Case(
        "dropout 0.05",
        lambda x: kernels.dropout(x, 0.05, 1),
        lambda x: functional.dropout(x, 0.05),
        [x],
    )

    def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    yield Case("rms_norm", lambda x, w: kernels.rms_norm(x, w, 1e-6), plain_norm, [x], [weight])
    yield Case(
        "layer_norm",
        lambda x, w: kernels.layer_norm(x, w, w, 1e-6),
        lambda x, w: functional.layer_norm(x, (WIDTH,), w, w, 1e-6),
        [x],
        [weight],
    )
    gate, up = random(TOKENS, WIDE), random(TOKENS, WIDE)
    yield Case("swiglu", kernels.swiglu, lambda g, u: functional.silu(g) * u, [gate, up])
    yield Case("geglu", kernels.geglu, lambda g, u: functional.gelu(g) * u, [gate, up])

    angles = torch.rand(TOKENS, HEAD // 2)
    cos, sin = torch.cat([angles.cos()] * 2, -1).to(dtype), torch.cat([angles.sin()] * 2, -1).to(dtype)

    def plain_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        return x * cos[:, None] + turned * sin[:, None]

    yield Case(
        "rope",
        lambda x, c, s: kernels.rope(x, c[:, : HEAD // 2], s[:, : HEAD // 2]),
        plain_rope,
        [random(TOKENS, HEADS, HEAD)],
        [cos, sin],
    )
    targets = torch.randint(VOCABULARY, (512,))
    yield Case(
        "linear_cross_entropy, 512 rows",
        lambda h, w: kernels.linear_cross_entropy(h, w, targets),
        lambda h, w: functional.cross_entropy(functional.linear(h, w).float(), targets, reduction="none"),
        [random(512, WIDTH)],
        [random(VOCABULARY, WIDTH) / 24],
    )

    low, high = random(8, WIDTH).float(), random(WIDE, 8).float()

    def plain_lora(x: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:  # as peft computes it
        update = functional.linear(functional.linear(functional.dropout(x.to(a.dtype), 0.05), a), b) * 2.0
        return functional.linear(x, weight) + update.to(x.dtype)

    yield Case(
        "lora_linear 576 -> 1536, r 8",
        lambda x, a, b, w: kernels.lora_linear(x, w, None, [kernels.LowRank(a, b, 2.0, 0.05, 1)]),
        plain_lora,
        [x, low, high],
        [random(WIDE, WIDTH) / 24],
    )
    for rows, length in ((4, 512), (16, 128), (1, 2048)):
        offsets = torch.arange(rows + 1) * length

        def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            shaped = [t.unflatten(0, (-1, length)).transpose(1, 2) for t in (q, k, v)]  # noqa: B023
            group = q.shape[1] // k.shape[1]
            keys, values = (t.repeat_interleave(group, 1) for t in shaped[1:])
            y = functional.scaled_dot_product_attention(shaped[0], keys, values, is_causal=True)
            return y.transpose(1, 2).flatten(0, 1)

        yield Case(
            f"attention {rows} x {length}, 9/3 heads of 64",
            lambda q, k, v, offsets=offsets: kernels.attention(q, k, v, offsets)[0],
            plain_attention,
            [random(TOKENS, heads, HEAD) for heads in (HEADS, KV_HEADS, KV_HEADS)],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--only", default="", help="operations whose name contains this")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"{kernels.chosen()}; {torch.get_num_threads()} threads, {options.dtype}, forward + backward, ms")
    print(f"{'':36}{'smidgen':>9}{'plain':>9}{'ratio':>7}   {'fastest':>9}{'plain':>9}{'ratio':>7}")
    for case in cases(getattr(torch, options.dtype)):
        if options.only not in case.name:
            continue
        times = [(timed(case.ours, case), timed(case.plain, case)) for _ in range(options.repeat + 2)][2:]
        ours, plain = zip(*times)
        columns = []
        for best in (statistics.median, min):
            columns.append(f"{best(ours):9.2f}{best(plain):9.2f}{best(plain) / best(ours):7.2f}")
        print(f"{case.name:36}{'   '.join(columns)}")


if __name__ == "__main__":
    main()
