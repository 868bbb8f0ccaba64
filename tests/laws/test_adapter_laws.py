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
from smidgen.adapters.base import Adapter, WeightAdapter, in_adapter
from smidgen.errors import MergeError, UsageError
from smidgen.registry import METHODS
from tests.conftest import logits, perturb, tiny_bert, tiny_gpt2, tokens, toy
from tests.laws.cases import (
    ALL,
    CASES,
    MORE_KEYS_THAN_PEFT,
    NOT_EQUAL_TO_PEFT,
    NOT_IDENTITY_AT_START,
    NOT_MERGEABLE,
    NOT_ROW_BY_ROW,
    REFUSED_ON_PLAIN_BASES,
    REFUSED_ON_STORED_BASES,
    STORED,
    configuration,
    excepted,
    grouped,
    marked,
    on_base,
    quick,
)


@pytest.fixture(params=map(marked, [*ALL, *STORED]))
def law(request: pytest.FixtureRequest) -> SimpleNamespace:
    """A case: its name, `plain()` for the model, `build()` for it on its base, `config()` for a new configuration."""
    method, case, base = request.param
    plain, _ = CASES[method][case]
    config = lambda: configuration(method, case, base)  # noqa: E731
    return SimpleNamespace(key=request.param[:2], plain=plain, build=on_base(plain, base), config=config, of=base)


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
    lists = {
        "do not start as the base model": NOT_IDENTITY_AT_START,
        "cannot be merged": NOT_MERGEABLE,
        "write more than peft": MORE_KEYS_THAN_PEFT,
        "are not compared with peft": NOT_EQUAL_TO_PEFT,
        "refuse rows of a batch that have their own": NOT_ROW_BY_ROW,
    }
    for told, exceptions in lists.items():
        for (method, case), reason in exceptions.items():
            assert case in CASES[method] or case == "*"
            assert len(reason) > 20
        count = sum(bool(excepted((method, case), exceptions)) for method, case, _ in ALL)
        print(f"exceptions: {count} of {len(ALL)} cases {told}")


def test_identity_at_start(law: SimpleNamespace) -> None:
    gap = (logits(adapted(law, move=False), tokens()) - logits(law.build(), tokens())).abs().max()
    if excepted(law.key, NOT_IDENTITY_AT_START):
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
        if adapter.is_mergeable() and (getattr(module, "groups", 1) == 1 or "lora" not in law.key):
            args, out = calls[path]
            below = Below(module, [])
            same(below.call_with(adapter.merged(fold(module, [])), *args), out)
            checked += 1
    assert checked or excepted(law.key, NOT_MERGEABLE)


def test_merged_equals_unmerged_and_unmerge_is_exact(law: SimpleNamespace) -> None:
    model = adapted(law)
    before, expected = {k: v.clone() for k, v in model.state_dict().items()}, logits(model, tokens())
    if excepted(law.key, NOT_MERGEABLE):
        with pytest.raises(MergeError, match="it cannot be merged"):
            model.merge_adapter()
        assert torch.equal(logits(model, tokens()), expected)
        return
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
    if excepted(law.key, NOT_MERGEABLE):
        pytest.skip("not mergeable; that it says so is tested above")
    model, plain = adapted(law), law.plain()
    expected = logits(model, tokens())
    merged = model.merge_and_unload()
    assert merged is model and type(merged) is type(plain)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    same(logits(merged, tokens()), expected, atol=2e-5)


def test_stack_of_unlike_adapters_equals_its_fold(law: SimpleNamespace) -> None:
    model = adapted(law, name="first")
    layer = {toy: "linear", grouped: "linear", tiny_gpt2: "mlp.c_proj", tiny_bert: "query"}.get(law.plain, "o_proj")
    if excepted(law.key, NOT_MERGEABLE):  # what reads the weight cannot stand above what is no function of it
        layer = {tiny_gpt2: "c_attn", tiny_bert: "query"}.get(law.plain, "q_proj")
    model.add_adapter("second", smidgen.LoraConfig(r=3, target_modules=[layer], use_dora=True))
    model.set_adapter(["first", "second"])
    perturb(model, seed=9)
    expected = logits(model, tokens())
    model.merge_adapter(["second"] if excepted(law.key, NOT_MERGEABLE) else None)
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
    assert all(map(in_adapter, trained))
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


NAMES = ["second", "__base__", "first", "second"]
GENERATED = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def near(actual: Tensor, expected: Tensor, base: str) -> None:
    gap = (actual - expected).abs().max() / expected.abs().max()
    assert gap < (1e-6 if base == "plain" else 2e-6), gap


def test_each_row_answers_as_its_adapter_alone(law: SimpleNamespace) -> None:
    """Rows of several lengths, padded on the left, prompts of several lengths; switching adapters is exact."""
    model, whole = adapted(law, name="first"), tokens(rows=4, length=12)
    first = logits(model, whole)
    config = law.config()
    if hasattr(config, "num_virtual_tokens"):
        config.num_virtual_tokens = 2
    model.add_adapter("second", config)
    assert torch.equal(logits(model, whole), first)
    model.set_adapter("second")
    perturb(model, seed=21)
    if excepted(law.key, NOT_ROW_BY_ROW):
        with pytest.raises(UsageError, match="works on a whole batch, not row by row"):
            model(whole, adapter_names=NAMES)
        return
    if not hasattr(model, "can_generate") or not model.can_generate():
        with torch.no_grad():
            answer = model(whole, adapter_names=NAMES)
        answer = answer if isinstance(answer, Tensor) else answer.logits
        for row, name in enumerate(NAMES):
            near(answer[row], alone(model, name, lambda row=row: logits(model, whole[row : row + 1])[0]), law.of)
        return
    lengths = [12, 5, 9, 7]
    mask = torch.arange(12) >= 12 - torch.tensor(lengths)[:, None]
    ids = torch.where(mask, whole, 0)
    padded: dict[str, Any] = {"attention_mask": mask.long(), "adapter_names": NAMES}
    with torch.no_grad():
        answer = model(ids, position_ids=(mask.cumsum(1) - 1).clamp(min=0), **padded).logits
        said = model.generate(ids, **padded, **GENERATED)
    for row, (name, length) in enumerate(zip(NAMES, lengths, strict=True)):
        own = ids[row : row + 1, -length:]
        near(answer[row, -length:], alone(model, name, lambda own=own: logits(model, own)[0]), law.of)
        expected = alone(model, name, lambda own=own: model.generate(own, **GENERATED)[0])
        assert torch.equal(said[row, -expected.shape[0] :], expected), name
    model.set_adapter("first")
    assert torch.equal(logits(model, whole), first)


def alone(model: Any, name: str, call: Any) -> Tensor:
    """What `call` answers while the adapter `name` answers alone."""
    if name == "__base__":
        with model.disable_adapter(), torch.no_grad():
            return call()
    model.set_adapter(name)
    with torch.no_grad():
        return call()


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
        assert parameter.dtype == (torch.float32 if in_adapter(name) else torch.bfloat16), name
    perturb(model)
    found = gradients(model)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    expected = logits(model.eval(), tokens()).float()
    if excepted(law.key, NOT_MERGEABLE):
        return
    model.merge_adapter()
    gap = (logits(model, tokens()).float() - expected).abs().max() / expected.abs().max()
    assert gap < 0.05


@pytest.mark.parametrize(
    ("key", "base", "said"),
    [(key, "nf4", said) for key, said in REFUSED_ON_STORED_BASES.items()]
    + [(key, "plain", said) for key, said in REFUSED_ON_PLAIN_BASES.items()],
)
def test_what_a_base_cannot_give_is_refused(key: tuple[str, str], base: str, said: str) -> None:
    model = on_base(CASES[key[0]][key[1]][0], base)()
    expected = logits(model, tokens())
    with pytest.raises(UsageError, match=said):
        smidgen.get_peft_model(model, configuration(*key, base))
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
        build = on_base(CASES[method][case][0], base)
        model = smidgen.get_peft_model(build(), configuration(method, case, base)).eval()
        perturb(model)
        folder = tmp_path / str(index)
        model.save_pretrained(folder)
        save_file({"logits": logits(model, tokens()).detach().contiguous()}, folder / "expected.safetensors")
        work.append((method, case, base, str(folder)))
    (tmp_path / "work.json").write_text(json.dumps(work))
    script = [sys.executable, "-c", FRESH, str(tmp_path / "work.json")]
    done = subprocess.run(script, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    gaps = json.loads(done.stdout.splitlines()[-1])
    assert len(gaps) == len(work)
    assert {name: gap for name, gap in gaps.items() if gap > 1e-6} == {}
