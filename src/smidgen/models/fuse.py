"""Puts the kernels under a model on a CPU: norms, gated feed-forward layers, attention.

A module is recognised by its parts and taken over only after the kernel reproduced its output and its gradient on the
loaded weights; attention is tried on the whole model. What is not reproduced stays as it was, and is told.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import ACT2FN
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from smidgen import kernels
from smidgen.adapters.attach import MadeInPlace, class_with, class_without
from smidgen.data.packing import IGNORED, Batch
from smidgen.kernels.attention import Scores
from smidgen.kernels.gated import gated
from smidgen.models.block import FusedBlock
from smidgen.models.scores import HEAD, SEGMENTS, Head, token_losses, vocabulary_size

ATTENTION = "smidgen"
_TOKENS = 24  # of the inputs that a module or a model is tried on
# How far losses may be from the model's own, relative to the whole: rounding adds up over its layers.
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.03, torch.float16: 0.03}


@contextmanager
def fused(model: Any, say: Callable[[str], None] = print) -> Iterator[None]:
    """Inside the block the model computes with kernels where it may; afterwards it is as it was.

    Nothing changes on other devices than the CPU, and where ``SMIDGEN_KERNELS=reference`` asks for plain PyTorch.
    """
    on_cpu = model.device.type == "cpu"
    if not on_cpu or kernels.instruction_set() == "reference":
        if on_cpu:
            say(kernels.chosen())
        yield
        return
    norms, gates = _take_over_modules(model)
    try:
        with _attending(model) as refusal, _in_blocks(model, not refusal) as blocks, _scoring(model) as head:
            parts = [f"{blocks} whole blocks"] * (blocks > 0)
            parts += [f"{norms} norms", f"{gates} feed-forward layers"]
            parts += ["attention"] * (not refusal) + ["cross-entropy"] * head
            say(f"{kernels.chosen()}: {', '.join(parts)}")
            if refusal:
                say(f"attention stays the model's own: {refusal}")
            yield
    finally:
        for module in model.modules():
            if isinstance(module, FusedModule):
                module.give_back()


# ---- modules ----


class FusedModule(MadeInPlace):
    """In front of the class of a module whose forward is a kernel's."""

    def give_back(self) -> None:
        """Make the module what it was."""
        mixin = next(kind for kind in type(self).__mro__ if kind in (FusedNorm, FusedFeedForward))
        del self.__dict__["how"]
        self.__class__ = class_without(type(self), mixin)


class FusedNorm(FusedModule):
    """RMSNorm. how: eps, what is added to the weight, and whether the result is rounded before it is multiplied."""

    weight: Tensor
    how: tuple[float, float, bool]

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, *self.how)


class FusedFeedForward(FusedModule):
    """down(act(gate(x)) * up(x)). how: the name of the activation."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    how: Any

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.how))


_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def _take_over_modules(model: nn.Module) -> tuple[int, int]:
    """Let kernels stand in for norms and feed-forward layers; answer how many of each."""
    counts = {FusedNorm: 0, FusedFeedForward: 0}
    for module in list(model.modules()):
        if "forward" in vars(module) or isinstance(module, MadeInPlace) or module._forward_hooks:
            continue
        for mixin, how in (*_norms_like(module), *_gates_like(module)):
            if _takes_over(module, mixin, how):
                counts[mixin] += 1
                break
    return counts[FusedNorm], counts[FusedFeedForward]


def _norms_like(module: Any) -> Iterator[tuple[type, tuple[float, float, bool]]]:
    """The settings with which a module may be an RMSNorm, the usual one first."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    only_weight = [name for name, _ in module.named_parameters()] == ["weight"] and module.weight.dim() == 1
    if only_weight and isinstance(eps, float):
        for offset, cast_first in ((0.0, True), (1.0, False), (0.0, False), (1.0, True)):
            yield FusedNorm, (eps, offset, cast_first)


def _gates_like(module: Any) -> Iterator[tuple[type, str]]:
    if {name for name, _ in module.named_children()} == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        for name, activation in _ACTIVATIONS.items():
            if type(module.act_fn) is type(ACT2FN[name]):
                yield FusedFeedForward, activation


def _takes_over(module: Any, mixin: type, how: Any) -> bool:
    """Put `mixin` in front of a module's class if it then answers as before, gradient included."""
    weight = module.weight if mixin is FusedNorm else module.gate_proj.weight
    x = torch.randn(_TOKENS, weight.shape[-1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    expected = _answer_and_gradient(module, x)
    original = type(module)
    module.how = how
    module.__class__ = class_with(mixin, original)
    if all(_near(a, b) for a, b in zip(expected, _answer_and_gradient(module, x), strict=True)):
        return True
    module.give_back()
    return False


def _answer_and_gradient(module: Any, x: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng([]), torch.enable_grad():
        torch.manual_seed(0)  # dropout of adapters below falls alike
        x = x.clone().requires_grad_()
        y = module(x, **others)
        above = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        (gradient,) = torch.autograd.grad(y, x, above)
    return y.detach(), gradient


def _near(one: Tensor, other: Tensor) -> bool:
    """Whether two results of one module differ by rounding only."""
    return _distance(one, other) <= (1e-5 if one.dtype == torch.float32 else 0.02)


# ---- attention ----

_own: ContextVar[str] = ContextVar("own")  # the attention that the model had before
# Where it is noted how each module attends, while that is asked for.
_seen: ContextVar[dict[nn.Module, Scores] | None] = ContextVar("seen", default=None)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query (B, H, T, D), key and value (B, K, T, D), answers (B, T, H, D)."""
    if attention_mask is None or attention_mask.dim() != 1:
        eager: Any = getattr(sys.modules[_original(type(module)).__module__], "eager_attention_forward", None)
        own = ALL_ATTENTION_FUNCTIONS.get_interface(_own.get(), eager)
        options = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap} | kwargs
        return own(module, query, key, value, attention_mask, **options)
    rows, heads, length, width = query.shape
    if (seen := _seen.get()) is not None:
        seen[module] = Scores(scaling or width**-0.5, sliding_window, softcap)
    q, k, v = (x.transpose(1, 2).reshape(rows * length, x.shape[1], x.shape[3]) for x in (query, key, value))
    out, _ = kernels.attention(q, k, v, attention_mask, scaling, sliding_window, softcap)
    return out.view(rows, length, heads, -1), None


def _original(kind: type) -> type:
    return next(other for other in kind.__mro__ if not issubclass(other, MadeInPlace))


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The segments, where they are known: they reach the attention in the place of a mask."""
    known = SEGMENTS.get()
    return ALL_MASK_ATTENTION_FUNCTIONS[_own.get()](*args, **kwargs) if known is None else known


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, _mask)


@contextmanager
def _attending(model: Any) -> Iterator[str | None]:
    """Let the model attend with the kernel inside the block; the value is why not, if it does not."""
    own = model.config._attn_implementation
    token = _own.set(own)
    try:
        expected, noisy = _losses_and_gradient(model, packed=False), _losses_and_gradient(model)
        model.set_attn_implementation(ATTENTION)
        refusal = _refusal(model, expected, noisy)
        if refusal:
            model.set_attn_implementation(own)
        yield refusal
    finally:
        model.set_attn_implementation(own)
        _own.reset(token)


def _refusal(model: Any, expected: tuple[Tensor, Tensor], noisy: tuple[Tensor, Tensor]) -> str | None:
    """Why the kernel does not attend as the model does to two rows (`expected`); `noisy`: packed, by the model itself.

    In 16 bits the gradient of a deep model is mostly rounding, so it is measured by what packing the rows changes.
    """
    if model.config._attn_implementation != ATTENTION:
        return "the model does not let its attention be chosen"
    dropped = [name for name in ("attention_dropout", "attn_pdrop") if getattr(model.config, name, 0)]
    if dropped:
        return f"it drops weights of the attention ({dropped[0]})"
    if not _alike(noisy[0], expected[0], model.dtype):
        return "the model itself mixes packed rows"
    losses, gradient = _losses_and_gradient(model)
    noise = _distance(noisy[1], expected[1])
    wrong = ["losses"] * (not _alike(losses, expected[0], model.dtype))
    wrong += ["gradient"] * (_distance(gradient, expected[1]) > max(BOUNDS[model.dtype], 2 * noise))
    return f"other {' and '.join(wrong)} with the kernel" if wrong else None


def _alike(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether two results of a whole model that computes in `dtype` differ by rounding only."""
    return _distance(one, other) <= BOUNDS[dtype]


def _distance(one: Tensor, other: Tensor) -> float:
    return ((one.float() - other.float()).norm() / other.float().norm().clamp_min(1e-12)).item()


# ---- whole blocks ----


@contextmanager
def _in_blocks(model: Any, attending: bool) -> Iterator[int]:
    """Let decoder layers run as whole blocks inside the block, if the kernel attends; the value is how many do."""
    blocks = [block for block in (_block_like(*call) for call in _calls(model)) if block] if attending else []
    try:
        yield len(blocks)
    finally:
        for block in blocks:
            block.give_back()


def _calls(model: Any) -> Iterator[tuple[Any, dict[str, Any], dict[nn.Module, Scores]]]:
    """Each decoder layer, what it was called with in a pass over two packed rows, and how the layers attended."""
    calls: dict[nn.Module, dict[str, Any]] = {}
    seen: dict[nn.Module, Scores] = {}
    layers = [module for module in model.modules() if {"self_attn", "mlp"} <= dict(module.named_children()).keys()]
    handles = [
        layer.register_forward_pre_hook(lambda layer, _, kwargs: calls.update({layer: kwargs}), with_kwargs=True)
        for layer in layers
        if "forward" not in vars(layer) and not isinstance(layer, MadeInPlace)
    ]
    token = _seen.set(seen)
    try:
        _losses_and_gradient(model)
    finally:
        _seen.reset(token)
        for handle in handles:
            handle.remove()
    for layer, kwargs in calls.items():
        yield layer, kwargs, seen


def _block_like(layer: Any, kwargs: dict[str, Any], seen: dict[nn.Module, Scores]) -> FusedBlock | None:
    """The layer taken over, if it then answers as before, gradient included."""
    try:
        block = FusedBlock(layer, seen)
    except (LookupError, AttributeError):
        return None
    weight = block.mix.weight
    x = torch.randn(1, _TOKENS, weight.shape[0], generator=torch.Generator().manual_seed(0))
    x = (x / 50).to(weight.dtype)  # small, so that what is added to it decides
    expected = _answer_and_gradient(layer, x, **kwargs)
    block.take_over()
    if all(_near(a, b) for a, b in zip(expected, _answer_and_gradient(layer, x, **kwargs), strict=True)):
        return block
    block.give_back()
    return None


# ---- the head ----


@contextmanager
def _scoring(model: Any) -> Iterator[bool]:
    """Let losses be computed from hidden states inside the block, if that gives the same; the value is whether."""
    expected = _losses_and_gradient(model)
    noise = _distance(_losses_and_gradient(model, packed=False)[1], expected[1])
    for head in _heads_like(model):
        vars(model)[HEAD] = head
        try:
            losses, gradient = _losses_and_gradient(model)
            close = _distance(gradient, expected[1]) <= max(BOUNDS[model.dtype], 2 * noise)
            if _alike(losses, expected[0], model.dtype) and close:
                yield True
                return
        finally:
            del vars(model)[HEAD]
    yield False


def _heads_like(model: Any) -> Iterator[Head]:
    """What the head of a model may be: a linear layer with a factor or a cap on its logits."""
    layer = model.get_output_embeddings()
    wrapped = "forward" in vars(model) or hasattr(model, "adapters")  # also an adapter around the whole model
    if type(layer) is not nn.Linear or "forward" in vars(layer) or wrapped or model.get_decoder() is model:
        return
    config: Any = model.config.get_text_config()
    cap, scale = getattr(config, "final_logit_softcapping", None), getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    yield Head(layer, cap, scale or (1 / divisor if divisor else 1.0))


# ---- trying a model ----


def _losses_and_gradient(model: Any, packed: bool = True) -> tuple[Tensor, Tensor]:
    """The losses of two rows, packed or one below the other, and the gradient at the embeddings of their tokens."""
    half = _TOKENS // 2
    ids = torch.randint(vocabulary_size(model), (2, half), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, 0] = IGNORED
    positions = torch.arange(half).repeat(2)[None] if packed else None
    shape = (1, _TOKENS) if packed else (2, half)
    batch = Batch(ids.view(shape), labels.view(shape), None, positions, [0, 1], _TOKENS - 2)
    embedded: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output if output.requires_grad else output.requires_grad_())
        return output

    handle = model.get_input_embeddings().register_forward_hook(keep)
    training = model.training
    try:
        model.eval()
        with torch.enable_grad():
            losses, _ = token_losses(model, batch)
            (gradient,) = torch.autograd.grad(losses.sum(), embedded[:1])
    finally:
        handle.remove()
        model.train(training)
    return losses.detach(), gradient.flatten(0, 1)
