"""Others set `forward` on an instance: hooks, offloading, mixed precision, sharding. No order silences an adapter."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

import smidgen
from smidgen.errors import UsageError
from tests.conftest import logits, perturb, tiny_llama, tokens

LAYER = "model.layers.0.self_attn.q_proj"
CONFIG = {"target_modules": ["q_proj", "down_proj"], "r": 4}


def attached(model: nn.Module) -> Any:
    torch.manual_seed(3)
    model = smidgen.get_peft_model(model, smidgen.LoraConfig(**CONFIG)).eval()
    perturb(model)
    return model


@pytest.fixture
def expected() -> Tensor:
    return logits(attached(tiny_llama()), tokens())


class Doubling(ModelHook):
    """A hook that changes the answer, so that it shows whether it ran."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output * 2


def hooked(model: nn.Module, hook: type[ModelHook] = ModelHook) -> nn.Module:
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            add_hook_to_module(module, hook())
    return model


def near(found: Tensor, expected: Tensor) -> bool:
    """Equal but for the order of sums: over a forward of others the update is computed step by step, else as one."""
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_hook_before_attaching(expected: Tensor) -> None:
    assert near(logits(attached(hooked(tiny_llama())), tokens()), expected)


def test_hook_after_attaching(expected: Tensor) -> None:
    assert torch.equal(logits(hooked(attached(tiny_llama())), tokens()), expected)


def test_hook_before_attaching_then_removed(expected: Tensor) -> None:
    model = attached(hooked(tiny_llama()))
    remove_hook_from_module(model, recurse=True)
    assert near(logits(model, tokens()), expected)


def test_hook_after_attaching_then_removed(expected: Tensor) -> None:
    model = hooked(attached(tiny_llama()))
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(logits(model, tokens()), expected)


def test_a_hook_below_sees_the_base_answer_and_one_above_the_adapted_one() -> None:
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    plain, model = tiny_llama().get_submodule(LAYER), attached(tiny_llama())
    update = model.get_submodule(LAYER)(x) - plain(x)
    below = attached(hooked(tiny_llama(), Doubling)).get_submodule(LAYER)(x)
    above = hooked(attached(tiny_llama()), Doubling).get_submodule(LAYER)(x)
    torch.testing.assert_close(below, 2 * plain(x) + update)
    torch.testing.assert_close(above, 2 * (plain(x) + update))


@pytest.mark.parametrize("before", [True, False])
def test_hook_then_unload_answers_as_the_base_with_its_hook(before: bool) -> None:
    model = attached(hooked(tiny_llama())) if before else hooked(attached(tiny_llama()))
    model.unload()
    assert torch.equal(logits(model, tokens()), logits(tiny_llama(), tokens()))
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(logits(model, tokens()), logits(tiny_llama(), tokens()))


@pytest.mark.parametrize("before", [True, False])
def test_weights_offloaded_to_the_cpu_between_calls(before: bool, expected: Tensor) -> None:
    def offload(model: nn.Module) -> nn.Module:
        for name, module in model.named_modules():
            if name.endswith(("q_proj", "down_proj")):
                hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=dict(module.state_dict()))
                add_hook_to_module(module, hook)
        return model

    model = attached(offload(tiny_llama())) if before else offload(attached(tiny_llama()))
    assert near(logits(model, tokens()), expected)


def test_mixed_precision_of_accelerate_before_and_after(expected: Tensor) -> None:
    base, model = tiny_llama(), attached(tiny_llama())
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # one of an earlier test has its own
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    after = accelerator.prepare_model(model)
    before = attached(accelerator.prepare_model(base))
    for wrapped in (after, before):
        answer = logits(wrapped, tokens())
        assert answer.dtype == torch.float32
        gap = (answer - expected).abs().max() / expected.abs().max()
        assert 0 < gap < 0.05
    assert torch.equal(logits(accelerator.unwrap_model(after, keep_fp32_wrapper=False), tokens()), expected)


def test_a_forward_from_before_lies_below(expected: Tensor) -> None:
    model = tiny_llama()
    layer = model.get_submodule(LAYER)
    calls = []

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        calls.append(1)
        return nn.functional.linear(x, self.weight, self.bias)

    layer.forward = types.MethodType(counted, layer)
    assert near(logits(attached(model), tokens()), expected)
    assert calls


def test_a_wrapper_set_later_wraps_the_adapters() -> None:
    model = attached(tiny_llama())
    layer = model.get_submodule(LAYER)
    x = torch.randn(2, 32)
    expected = 3 * layer(x)

    def tripled(inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(inner)
        def call(*args: Any) -> Tensor:
            return 3 * inner(*args)

        return call

    original = layer.forward
    layer.forward = tripled(original)
    assert torch.equal(layer(x), expected)
    layer.forward = original
    assert torch.equal(3 * layer(x), expected)
    layer.forward = lambda x: 3 * original(x)  # of unknown make, but it does come to the adapters
    assert torch.equal(layer(x), expected)
    del layer.forward
    assert torch.equal(3 * layer(x), expected)


def test_a_forward_that_would_silence_the_adapters_is_an_error() -> None:
    model = attached(tiny_llama())
    layer = model.get_submodule(LAYER)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight)
    with pytest.raises(UsageError, match="so the adapters would do nothing"):
        logits(model, tokens())


@pytest.fixture
def one_process_group(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sharded_by_fsdp2_after_attaching(one_process_group: None, expected: Tensor) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    model = attached(tiny_llama())
    fully_shard(model.get_submodule(LAYER), mesh=mesh)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    answer = logits(model, tokens())
    torch.testing.assert_close(answer, expected)
    answer.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.unload()
    assert "FSDP" in type(model).__name__
    assert not any(getattr(module, "is_adapted", False) for module in model.modules())
    torch.testing.assert_close(logits(model, tokens()), logits(tiny_llama(), tokens()))
