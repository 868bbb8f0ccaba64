"""What must hold for every method under every option: one test a law, over all cases of the registry."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import smidgen
from smidgen.adapters.attach import Below, adapted_modules, adapters_of, fold
from smidgen.adapters.base import Adapter, WeightAdapter
from smidgen.errors import UsageError
from smidgen.registry import METHODS
from tests.conftest import logits, perturb, tiny_gpt2, tokens, toy
from tests.laws.cases import (
    BASES,
    CASES,
    NOT_IDENTITY_AT_START,
    QUICK,
    REFUSED_ON_STORED_BASES,
    grouped,
    on_base,
)

ALL = [(method, case, "plain") for method, cases in CASES.items() for case in cases]
STORED = [
    (method, case, base)
    for base in BASES[1:]
    for method, cases in CASES.items()
    for case, (build, _) in cases.items()
    if build not in (toy, grouped) and (method, case) not in REFUSED_ON_STORED_BASES
]


def quick(key: tuple[str, str, str]) -> bool:
    method, case, base = key
    return case in QUICK[base][method]


def marked(key: tuple[str, str, str]) -> Any:
    return pytest.param(key, id="-".join(key), marks=[pytest.mark.slow] * (not quick(key)))


@pytest.fixture(params=map(marked, [*ALL, *STORED]))
def law(request: pytest.FixtureRequest) -> SimpleNamespace:
    """A case: its name, `plain()` for the model, `build()` for it on its base, `config()` for a new configuration."""
    method, case, base = request.param
    plain, options = CASES[method][case]
    make = METHODS[method].load().config_class
    config = lambda: make(**copy.deepcopy(options))  # noqa: E731
    return SimpleNamespace(key=request.param[:2], plain=plain, build=on_base(plain, base), config=config)


def adapted(law: SimpleNamespace, move: bool = True, name: str = "default") -> Any:
    torch.manual_seed(3)
    model = smidgen.get_peft_model(law.build(), law.config(), adapter_name=name).eval()
    if move:
        perturb(model)
    return model


def same(actual: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-5)


def test_every_adapter_of_the_registry_has_cases() -> None:
    adapters = {name for name, entry in METHODS.items() if issubclass(entry.load(), Adapter)}
    assert adapters == CASES.keys()


def test_exceptions_name_a_case_and_a_reason() -> None:
    for key, reason in NOT_IDENTITY_AT_START.items():
        assert (*key, "plain") in ALL and len(reason) > 20
    print(f"exceptions: {len(NOT_IDENTITY_AT_START)} of {len(ALL)} cases do not start as the base model")


def test_identity_at_start(law: SimpleNamespace) -> None:
    gap = (logits(adapted(law, move=False), tokens()) - logits(law.build(), tokens())).abs().max()
    if law.key in NOT_IDENTITY_AT_START:
        assert gap > 1e-3
    else:
        assert gap < 1e-5


def test_forward_equals_apply_of_merge(law: SimpleNamespace) -> None:
    model, calls = adapted(law), {}
    for path, module in adapted_modules(model):
        module.register_forward_hook(lambda m, args, out, path=path: calls.update({path: (args, out)}))
    logits(model, tokens())
    checked = 0
    for path, adapter in adapters_of(model, "default"):
        module: Any = model.get_submodule(path)
        if getattr(module, "groups", 1) == 1 or "lora" not in law.key:
            args, out = calls[path]
            below = Below(module, [])
            same(below.call_with(adapter.merged(fold(module, [])), *args), out)
            checked += 1
    assert checked


def test_merged_equals_unmerged_and_unmerge_is_exact(law: SimpleNamespace) -> None:
    model = adapted(law)
    before, expected = {k: v.clone() for k, v in model.state_dict().items()}, logits(model, tokens())
    model.merge_adapter()
    same(logits(model, tokens()), expected, atol=2e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens()), logits(law.build(), tokens()))
    same(logits(model, tokens()), expected, atol=2e-5)
    model.unmerge_adapter()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(logits(model, tokens()), expected)


def test_merge_and_unload_answers_a_plain_model(law: SimpleNamespace) -> None:
    model, plain = adapted(law), law.plain()
    expected = logits(model, tokens())
    merged = model.merge_and_unload()
    assert merged is model and type(merged) is type(plain)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    same(logits(merged, tokens()), expected, atol=2e-5)


def test_stack_of_unlike_adapters_equals_its_fold(law: SimpleNamespace) -> None:
    model = adapted(law, name="first")
    layer = {toy: "linear", grouped: "linear", tiny_gpt2: "mlp.c_proj"}.get(law.plain, "o_proj")
    model.add_adapter("second", smidgen.LoraConfig(r=3, target_modules=[layer], use_dora=True))
    model.set_adapter(["first", "second"])
    perturb(model, seed=9)
    expected = logits(model, tokens())
    model.merge_adapter()
    same(logits(model, tokens()), expected, atol=5e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model, tokens()), expected)


def test_off_equals_base_to_the_bit(law: SimpleNamespace) -> None:
    model, expected = adapted(law), logits(law.build(), tokens())
    assert not torch.equal(logits(model, tokens()), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens()), expected)
    assert not torch.equal(logits(model, tokens()), expected)


def gradients(model: Any) -> dict[str, Tensor]:
    logits(model, tokens()).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_every_adapter_parameter_gets_a_finite_gradient_and_no_base_parameter_does(law: SimpleNamespace) -> None:
    model = adapted(law)
    found = gradients(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == trained
    assert all(".adapters." in name for name in trained)
    for name, gradient in found.items():
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0, name


def test_gradients_equal_those_through_the_merged_weight(law: SimpleNamespace) -> None:
    """`forward` may be a cheaper equal of `merge`: in its gradients too."""
    model = adapted(law)
    expected = gradients(model)
    model.zero_grad()
    for _, adapter in adapters_of(model, "default"):
        if isinstance(adapter, WeightAdapter):
            adapter.forward = lambda inner, x, a=adapter: WeightAdapter.forward(a, inner, x)
    actual = gradients(model)
    for name, gradient in expected.items():
        same(actual[name], gradient, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(law: SimpleNamespace) -> None:
    if law.plain in (toy, grouped):
        pytest.skip("a plain module has no gradient checkpointing")
    model = adapted(law).train()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        same(actual[name], gradient, atol=1e-6)


def test_deepcopy_is_independent_and_pickle_is_refused(law: SimpleNamespace) -> None:
    model = adapted(law)
    expected = logits(model, tokens())
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, tokens()), expected)
    perturb(twin, seed=11)
    assert not torch.equal(logits(twin, tokens()), expected)
    assert torch.equal(logits(model, tokens()), expected)
    with pytest.raises(UsageError, match="cannot be pickled: save the adapter with save_pretrained"):
        pickle.dumps(model)


def test_each_row_with_its_own_adapter_equals_one_at_a_time(law: SimpleNamespace) -> None:
    model = adapted(law, name="first")
    model.add_adapter("second", law.config())
    model.set_adapter("second")
    perturb(model, seed=21)
    expected = []
    for row, name in enumerate(["second", "__base__", "first"]):
        if name == "__base__":
            with model.disable_adapter():
                expected.append(logits(model, tokens()[row : row + 1]))
        else:
            model.set_adapter(name)
            expected.append(logits(model, tokens()[row : row + 1]))
    answer = model(tokens(), adapter_names=["second", "__base__", "first"])
    same(answer if isinstance(answer, Tensor) else answer.logits, torch.cat(expected))


def test_detach_leaves_nothing(law: SimpleNamespace) -> None:
    plain, model = law.build(), adapted(law)
    model.unload()
    for (path, left), (_, fresh) in zip(model.named_modules(), plain.named_modules(), strict=True):
        assert type(left) is type(fresh), path
        assert left.__dict__.keys() == fresh.__dict__.keys(), path
    assert torch.equal(logits(model, tokens()), logits(plain, tokens()))


def test_base_stays_16_bit_and_adapter_fp32(law: SimpleNamespace) -> None:
    model = smidgen.get_peft_model(law.build().bfloat16(), law.config())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".adapters." in name else torch.bfloat16), name
    perturb(model)
    found = gradients(model)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    expected = logits(model.eval(), tokens()).float()
    model.merge_adapter()
    gap = (logits(model, tokens()).float() - expected).abs().max() / expected.abs().max()
    assert gap < 0.05


@pytest.mark.parametrize("key", REFUSED_ON_STORED_BASES, ids="-".join)
def test_what_trains_stored_weights_is_refused(key: tuple[str, str]) -> None:
    build, options = CASES[key[0]][key[1]]
    model = on_base(build, "nf4")()
    expected = logits(model, tokens())
    with pytest.raises(UsageError, match=REFUSED_ON_STORED_BASES[key]):
        smidgen.get_peft_model(model, METHODS[key[0]].load().config_class(**options))
    assert torch.equal(logits(model, tokens()), expected)


@pytest.mark.slow
def test_compiled_equals_eager(law: SimpleNamespace) -> None:
    torch._dynamo.reset()
    model = adapted(law)
    expected = logits(model, tokens())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=False)
    same(logits(compiled, tokens()), expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["default", "dora"])
def test_inductor_equals_eager(case: str) -> None:
    torch._dynamo.reset()
    build, options = CASES["lora"][case]
    model = smidgen.get_peft_model(build(), smidgen.LoraConfig(**options))
    perturb(model)
    expected = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model)
    logits(compiled, tokens()).square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            same(parameter.grad, expected[name], atol=1e-4)


FRESH = """
import json, sys, torch, warnings
warnings.simplefilter("ignore")
import smidgen
from safetensors.torch import load_file
from tests.conftest import logits, tokens
from tests.laws.cases import CASES, on_base
from pathlib import Path
gaps = {}
for method, case, base, folder in json.loads(Path(sys.argv[1]).read_text()):
    model = smidgen.PeftModel.from_pretrained(on_base(CASES[method][case][0], base)(), folder)
    expected = load_file(folder + "/expected.safetensors")["logits"]
    gaps[f"{method}-{case}-{base}"] = (logits(model, tokens()) - expected).abs().max().item()
print(json.dumps(gaps))
"""


def test_saved_and_loaded_in_a_fresh_process_answers_the_same(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    work = []
    for index, (method, case, base) in enumerate([*ALL, *filter(quick, STORED)]):
        build, options = CASES[method][case]
        model = smidgen.get_peft_model(
            on_base(build, base)(), METHODS[method].load().config_class(**copy.deepcopy(options))
        ).eval()
        perturb(model)
        folder = tmp_path / str(index)
        model.save_pretrained(folder)
        save_file({"logits": logits(model, tokens()).detach()}, folder / "expected.safetensors")
        work.append((method, case, base, str(folder)))
    (tmp_path / "work.json").write_text(json.dumps(work))
    script = [sys.executable, "-c", FRESH, str(tmp_path / "work.json")]
    done = subprocess.run(script, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    gaps = json.loads(done.stdout.splitlines()[-1])
    assert len(gaps) == len(work)
    assert {name: gap for name, gap in gaps.items() if gap > 1e-6} == {}
