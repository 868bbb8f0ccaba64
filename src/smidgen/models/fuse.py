"""Puts the kernels under a model on a CPU: norms, feed-forward layers, attention, cross-entropy.

A module is recognised by its parts and taken over only after the kernel reproduced its output and its gradient on the
loaded weights; attention and the head are tried on the whole model. What is not reproduced stays as it was, and is
told.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from smidgen import kernels
from smidgen.adapters.attach import MadeInPlace, class_with
from smidgen.data.packing import IGNORED, Batch
from smidgen.errors import UsageError
from smidgen.kernels.attention import Scores
from smidgen.models import attention
from smidgen.models.block import FusedBlock
from smidgen.models.fused_modules import KINDS, FusedModule
from smidgen.models.scores import HEAD, HOOKS, Head, token_losses, vocabulary_size
from smidgen.quant.linear import QuantizedLinear

_TOKENS = 24  # of the inputs that a module or a model is tried on
# How far a model's results may be from its own, relative to the whole: rounding adds up over its layers.
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.06, torch.float16: 0.06}


def fuse(model: nn.Module, say: Callable[[str], None] = print) -> None:
    """Let a model compute with kernels where it may, until `unfuse`; what it answers stays the same but for rounding.

    On other devices than the CPU, and where ``SMIDGEN_KERNELS=reference`` asks for plain PyTorch, only the
    cross-entropy is taken over: it needs no native code.

    Args:
        model: one of transformers, whole or with adapters of smidgen or peft, also within a wrapper.
        say: takes the lines about what was taken over, and what was not and why.

    Raises:
        UsageError: there is no model of transformers in it.
    """
    unfuse(model)
    inner = _transformer(model)
    on_cpu = inner.device.type == "cpu"
    native = on_cpu and kernels.instruction_set() != "reference"
    parts, refusal = [], None
    try:
        with _at_rest(inner):
            if native:
                counts = _take_over_modules(inner)
                with _noting_calls(inner) as calls:
                    refusal = _take_over_attention(inner)
                blocks = 0 if refusal else _take_over_blocks(calls)
                parts = [f"{count} {name}" for name, count in ({"whole blocks": blocks} | counts).items() if count]
                parts += ["attention"] * (not refusal)
            _take_over_head(inner)
    except BaseException:
        unfuse(model)
        raise
    parts += ["cross-entropy"] * (HEAD in vars(inner))
    chosen = kernels.chosen() if on_cpu else f"kernels: PyTorch's own on {inner.device.type}"
    say(f"{chosen}: {', '.join(parts) or 'nothing of this model'}")
    if refusal:
        say(f"attention stays the model's own: {refusal}")


def unfuse(model: nn.Module) -> None:
    """Make a model compute as it did before `fuse`."""
    inner = _transformer(model)
    for module in inner.modules():
        if isinstance(block := vars(module).get("forward"), FusedBlock):
            block.give_back()
        if isinstance(module, FusedModule):
            module.give_back()
    attention.give_back(inner)
    vars(inner).pop(HEAD, None)


@contextmanager
def fused(model: nn.Module, say: Callable[[str], None] = print) -> Iterator[None]:
    """`fuse` inside the block, `unfuse` after it."""
    fuse(model, say)
    try:
        yield
    finally:
        unfuse(model)


def _transformer(model: nn.Module) -> Any:
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise UsageError(f"fuse: there is no model of transformers in this {type(model).__name__}")


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Nothing is dropped inside the block, and hooks do not see the trials."""
    states = [(vars(module), {name: vars(module)[name] for name in ("training", *HOOKS)}) for module in model.modules()]
    for parts, _ in states:
        parts.update({name: OrderedDict() for name in HOOKS}, training=False)
    try:
        with torch.enable_grad(), torch.random.fork_rng([]):
            yield
    finally:
        for parts, before in states:
            for name in HOOKS:  # transformers may have added those by which it shows hidden states
                before[name].update(parts[name])
            parts.update(before)


# ---- modules ----


def _take_over_modules(model: nn.Module) -> dict[str, int]:
    """Let kernels stand in for modules; answer how many of each kind."""
    counts = dict.fromkeys((kind.name for kind in KINDS), 0)
    for module in list(model.modules()):
        if "forward" in vars(module) or isinstance(module, MadeInPlace):
            continue
        for kind in KINDS:
            counts[kind.name] += any(_takes_over(module, kind, how) for how in kind.settings(module))
    return counts


def _takes_over(module: Any, kind: type[FusedModule], how: Any) -> bool:
    """Put `kind` in front of a module's class if it then answers as before, gradient included."""
    original = type(module)
    try:
        expected = _answer_and_gradient(module)
        module.how, module.__class__ = how, class_with(kind, original)
        if all(map(_near, _answer_and_gradient(module), expected)):
            return True
    except Exception:  # what only looks like one of the kind may fail in any way
        pass
    if isinstance(module, FusedModule):
        module.give_back()
    return False


def _answer_and_gradient(module: nn.Module, scale: float = 1, **others: Any) -> tuple[Tensor, Tensor]:
    """For one input of the module's width and type, `scale` large."""
    stored = next((child for child in module.modules() if isinstance(child, QuantizedLinear)), None)
    weight = next(module.parameters(), torch.empty(64))
    width, dtype = (stored.in_features, stored.dtype) if stored is not None else (weight.shape[-1], weight.dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _TOKENS, width, generator=generator) * scale
    x = x.to(dtype).requires_grad_()
    y = module(x, **others)
    (gradient,) = torch.autograd.grad(y, x, torch.randn(y.shape, generator=generator).to(y.dtype))
    return y.detach(), gradient


def _near(one: Tensor, other: Tensor) -> bool:
    """Whether two results of one module differ by rounding only."""
    return _distance(one, other) <= (1e-5 if one.dtype == torch.float32 else 0.02)


def _distance(one: Tensor, other: Tensor) -> float:
    return ((one.float() - other.float()).norm() / other.float().norm().clamp_min(1e-12)).item()


# ---- the whole model ----

Results = tuple[Tensor, Tensor]  # what a model answers to two rows, and the gradient at the embeddings of their tokens


def _take_over_attention(model: Any) -> str | None:
    """Let the model attend with the kernel, or answer why not."""
    dropped = [name for name in ("attention_dropout", "attn_pdrop") if getattr(model.config, name, 0)]
    if dropped:
        return f"it drops weights of the attention ({dropped[0]})"
    try:
        expected, packed, shown = _states(model, False), _states(model, True), _shown(model)
        attention.use(model)
        if not attention.in_use(model):
            return "the model does not let its attention be chosen"
        if not torch.equal(_shown(model), shown):
            refusal = "it would not show its weights (output_attentions)"
        else:
            refusal = _difference(_states(model, True), expected, packed)
    except Exception as error:  # of a model that is built in another way, anything may fail
        refusal = f"{type(error).__name__}: {error}".splitlines()[0]
    if refusal:
        attention.give_back(model)
    return refusal


class _Call(NamedTuple):
    """What a decoder layer was called with last, and how it attended then."""

    kwargs: dict[str, Any]
    seen: dict[nn.Module, Scores]


@contextmanager
def _noting_calls(model: nn.Module) -> Iterator[dict[nn.Module, _Call]]:
    """The last call of each decoder layer inside the block."""
    calls: dict[nn.Module, _Call] = {}
    seen: dict[nn.Module, Scores] = {}
    layers = [module for module in model.modules() if {"self_attn", "mlp"} <= dict(module.named_children()).keys()]
    handles = [
        layer.register_forward_pre_hook(lambda at, _, kwargs: calls.update({at: _Call(kwargs, seen)}), with_kwargs=True)
        for layer in layers
        if "forward" not in vars(layer) and not isinstance(layer, MadeInPlace)
    ]
    token = attention.SEEN.set(seen)
    try:
        yield calls
    finally:
        attention.SEEN.reset(token)
        for handle in handles:
            handle.remove()


def _take_over_blocks(calls: dict[nn.Module, _Call]) -> int:
    """Let decoder layers run as whole blocks; answer how many do."""
    return sum(_takes_over_block(*call) for call in calls.items())


def _takes_over_block(layer: Any, call: _Call) -> bool:
    """Let a layer run as one block, if it then answers as before, gradient included."""
    kwargs = call.kwargs
    try:
        block = FusedBlock(layer, call.seen)
    except (LookupError, AttributeError):
        return False
    small = 0.02  # so that what is added to the input decides
    expected = _answer_and_gradient(layer, small, **kwargs)
    block.take_over()
    if all(map(_near, _answer_and_gradient(layer, small, **kwargs), expected)):
        return True
    block.give_back()
    return False


def _take_over_head(model: Any) -> None:
    """Let losses be computed from hidden states, if that gives the same, gradient included."""
    config = model.config.get_text_config()
    cap, scale = getattr(config, "final_logit_softcapping", None), getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    try:
        # Around an adapter of the whole model no loss is taken so, and a trial would read past the faked answer: an
        # IndexError on a CPU, the end of all computing on a GPU.
        if model.get_decoder() is model or hasattr(model, "adapters"):
            return
        expected = _scored(model)
        vars(model)[HEAD] = Head(cap, scale or (1 / divisor if divisor else 1.0))
        same = all(map(_near, _scored(model), expected))
    except Exception:  # of a model whose head is not over a vocabulary
        same = False
    if not same:
        vars(model).pop(HEAD, None)


def _scored(model: Any) -> Results:
    """The losses of tokens of which the decoder says something random, and the gradient of that."""
    weight, decoder = model.get_input_embeddings().weight, model.get_decoder()
    batch = _rows(model, packed=False).to(weight.device)
    shape = (*batch.input_ids.shape, model.config.get_text_config().hidden_size)
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(weight).requires_grad_()
    own = vars(decoder).get("forward")
    vars(decoder)["forward"] = lambda *_, **__: BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)
    try:
        losses, _ = token_losses(model, batch)
    finally:
        del vars(decoder)["forward"]
        if own is not None:
            vars(decoder)["forward"] = own
    return losses.detach(), torch.autograd.grad(losses.sum(), hidden)[0]


def _difference(found: Results, expected: Results, packed: Results) -> str | None:
    """What the kernel changed, measured on packed rows, from what the model answers to rows one below the other.

    In 16 bits the gradient of a deep model is mostly rounding, so it is measured by what packing changes without a
    kernel (`packed`).
    """
    noise, far = ([_distance(a, b) for a, b in zip(one, expected, strict=True)] for one in (packed, found))
    bound = BOUNDS[found[1].dtype]
    if noise[0] > bound:
        return "the model itself mixes packed rows"
    wrong = ["answers"] * (far[0] > bound) + ["gradient"] * (far[1] > max(bound, 2 * noise[1]))
    return f"other {' and '.join(wrong)} with the kernel" if wrong else None


def _states(model: Any, packed: bool) -> Results:
    """The last hidden states, and the gradient of a random sum of them."""
    rows = _rows(model, packed)
    inputs = {"input_ids": rows.input_ids, "use_cache": False}
    if packed:
        inputs["position_ids"] = rows.position_ids
    embedded: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output if output.requires_grad else output.requires_grad_())
        return output

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        y = model.get_decoder()(**inputs).last_hidden_state.flatten(0, 1)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        (gradient,) = torch.autograd.grad(y, embedded[:1], weight)
    finally:
        handle.remove()
    return y.detach(), gradient.flatten(0, 1)


def _shown(model: Any) -> Tensor:
    """The weights of the attention, where the model's own shows them; otherwise nothing."""
    if model.config._attn_implementation not in ("eager", attention.NAMES["eager"]):
        return torch.empty(0)
    rows = _rows(model, packed=False)
    with torch.no_grad():
        shown = model.get_decoder()(rows.input_ids, output_attentions=True, use_cache=False).attentions or ()
    return torch.cat([torch.empty(0), *(weights.flatten() for weights in shown if weights is not None)])


def _rows(model: Any, packed: bool) -> Batch:
    """Two rows, packed or one below the other."""
    half = _TOKENS // 2
    ids = torch.randint(vocabulary_size(model), (2, half), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, 0] = IGNORED
    positions = torch.arange(half).repeat(2)[None] if packed else None
    shape = (1, _TOKENS) if packed else (2, half)
    return Batch(ids.view(shape), labels.view(shape), None, positions, [0, 1], _TOKENS - 2)
