"""A new method is one class: each family of methods, written here in a few lines, works without another change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import smidgen
from smidgen.adapters.base import Adapter, OnModel, Place, WeightAdapter
from smidgen.adapters.config import PeftConfig
from smidgen.adapters.targets import find_targets
from smidgen.errors import MergeError, UsageError
from smidgen.registry import METHODS, Entry
from tests.conftest import logits, perturb, tiny_llama, tokens


@dataclass(kw_only=True)
class TargetConfig(PeftConfig):
    target_modules: Any = None
    exclude_modules: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None


@dataclass(kw_only=True)
class ScaleConfig(TargetConfig):
    peft_type: ClassVar[str] = "SCALE"


class Scale(WeightAdapter):
    """Scales each output: only `merge` is written, and all places share one budget made by `share`."""

    config_class = ScaleConfig

    @classmethod
    def plan(cls, model: nn.Module, config: ScaleConfig) -> Iterator[Place]:
        return (Place(path, cls, config) for path in find_targets(model, config))

    @classmethod
    def share(cls, model: nn.Module, config: ScaleConfig, paths: list[str]) -> dict[str, int]:
        return {"places": len(paths)}

    def __init__(self, base: Any, config: ScaleConfig, shared: Any = None):
        super().__init__(base, config, shared)
        self.places = shared["places"]
        self.scale_l = nn.Parameter(torch.ones(self.layer.shape[0], 1))

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.scale_l * weight, None if bias is None else self.scale_l.flatten() * bias

    def penalty(self) -> Tensor:
        return (self.scale_l - 1).square().sum()


@dataclass(kw_only=True)
class BottleneckConfig(TargetConfig):
    peft_type: ClassVar[str] = "BOTTLENECK"
    r: int = 4


class Bottleneck(Adapter):
    """A small network after a whole module (the MLP block): only `forward`, and it cannot be merged."""

    config_class = BottleneckConfig

    @classmethod
    def plan(cls, model: nn.Module, config: BottleneckConfig) -> Iterator[Place]:
        return (Place(path, cls, config) for path, _ in model.named_modules() if path.endswith(".mlp"))

    def __init__(self, base: Any, config: BottleneckConfig, shared: Any = None):
        super().__init__(base, config, shared)
        width = base.down_proj.weight.shape[0]
        self.down, self.up = nn.Linear(width, config.r), nn.Linear(config.r, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, inner: Any, x: Tensor) -> Tensor:
        y = inner(x)
        return y + self.up(torch.relu(self.down(y)))


@dataclass(kw_only=True)
class PromptConfig(PeftConfig):
    peft_type: ClassVar[str] = "PROMPT"
    num_virtual_tokens: int = 4


class Prompt(OnModel):
    """Virtual tokens before every input: stands around the whole model's call."""

    config_class = PromptConfig

    def __init__(self, base: Any, config: PromptConfig, shared: Any = None):
        super().__init__(base, config, shared)
        width = base.get_input_embeddings().weight.shape[1]
        self.prompt_embeddings = nn.Parameter(torch.randn(config.num_virtual_tokens, width))
        self.embed = [base.get_input_embeddings()]

    def forward(self, inner: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        prompt = self.prompt_embeddings.expand(len(input_ids), -1, -1)
        answer = inner(inputs_embeds=torch.cat([prompt, self.embed[0](input_ids)], dim=1), **kwargs)
        answer.logits = answer.logits[:, len(self.prompt_embeddings) :]
        return answer


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Scale", "Bottleneck", "Prompt"):
        monkeypatch.setitem(METHODS, name.lower(), Entry(name.lower(), f"{__name__}:{name}", "for this test"))


CONFIGS = {
    "scale": lambda: ScaleConfig(target_modules=["q_proj", "up_proj"]),
    "bottleneck": lambda: BottleneckConfig(),
    "prompt": lambda: PromptConfig(),
}


@pytest.fixture(params=CONFIGS)
def adapted(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(2)
    model = smidgen.get_peft_model(tiny_llama(), CONFIGS[request.param]())
    perturb(model, scale=0.3)
    return model.eval()


def test_answers_trains_switches_off_and_comes_off(adapted: Any) -> None:
    base, answer = logits(tiny_llama(), tokens()), logits(adapted, tokens())
    assert answer.shape == base.shape and (answer - base).abs().max() > 1e-3
    answer.square().mean().backward()
    assert all((p.grad is not None) == (".adapters." in f".{name}") for name, p in adapted.named_parameters())
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, tokens()), base)
    adapted.unload()
    assert type(adapted) is type(tiny_llama()) and torch.equal(logits(adapted, tokens()), base)


def test_saves_and_loads(adapted: Any, tmp_path: Path) -> None:
    adapted.save_pretrained(tmp_path)
    loaded = smidgen.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(loaded, tokens()), logits(adapted, tokens()))


def test_stands_together_with_lora(adapted: Any) -> None:
    adapted.add_adapter("lora", smidgen.LoraConfig(target_modules=["up_proj", "v_proj"]))
    alone = logits(adapted, tokens())
    adapted.set_adapter(["default", "lora"])
    assert torch.allclose(logits(adapted, tokens()), alone, atol=1e-6)
    perturb(adapted)
    assert not torch.allclose(logits(adapted, tokens()), alone, atol=1e-3)


def test_what_is_no_function_of_the_weight_says_so() -> None:
    for name in ("bottleneck", "prompt"):
        model = smidgen.get_peft_model(tiny_llama(), CONFIGS[name]())
        with pytest.raises(MergeError, match="changes more than weights: it cannot be merged"):
            model.merge_and_unload()
        assert isinstance(model, smidgen.PeftModel)


def test_merge_alone_defines_a_method() -> None:
    model = smidgen.get_peft_model(tiny_llama(), CONFIGS["scale"]())
    perturb(model)
    expected = logits(model, tokens())
    assert model.model.layers[0].self_attn.q_proj.adapters["default"].places == 4
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens()), expected)


def test_rows_of_a_batch_are_refused_by_name_where_a_method_needs_the_whole() -> None:
    model = smidgen.get_peft_model(tiny_llama(), CONFIGS["prompt"]())
    with pytest.raises(UsageError, match="Prompt works on a whole batch, not row by row"):
        model(tokens(), adapter_names=["default", "__base__", "default"])
