"""What holds of every model holds with the kernels under it: each law is tried on a model and on the same one fused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smidgen
from smidgen import LoraConfig, kernels
from smidgen.adapters.methods import lora
from smidgen.kernels.dropout import scaled_mask
from smidgen.models import attention
from smidgen.models.scores import token_losses
from tests.models.test_fuse import KINDS, adapted, packed, padded, results

pytestmark = pytest.mark.skipif(kernels.instruction_set() == "reference", reason="no kernels: not built, or not wanted")


@pytest.fixture(autouse=True)
def own_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test begins and ends with the kernels that the machine chooses."""
    yield
    monkeypatch.undo()
    kernels.forget()


NAMES = ("llama", "qwen2", "gemma2", "phi3", "gpt2")
Answers = dict[str, Tensor]


def quiet(line: str) -> None:
    """Says nothing."""


def both(
    monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[Any], Answers], **options: Any
) -> Iterator[Answers]:
    """What comes of `act` on plain PyTorch, and then of the same with the kernels under the model."""
    for kernel_set in ("reference", kernels.available()[0]):
        monkeypatch.setenv("SMIDGEN_KERNELS", kernel_set)
        kernels.forget()
        model = adapted(KINDS[name][0], **options).train()
        smidgen.fuse(model, say=quiet)
        assert attention.in_use(model) == (kernel_set != "reference")
        torch.manual_seed(0)
        yield act(model)


def assert_same(pair: Iterator[Answers], tolerance: float = 1e-4) -> None:
    expected, found = pair
    assert found.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        difference = (found[name] - tensor).float().norm() / tensor.float().norm().clamp_min(1e-6)
        assert difference < tolerance, (name, difference)


def gradients(model: Any) -> Answers:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- graphs ----


def two_forwards(model: Any) -> Answers:
    first, second = token_losses(model, padded())[0], token_losses(model, packed())[0]
    (first.mean() + 2 * second.mean()).backward()
    return gradients(model)


def no_grad_between(model: Any) -> Answers:
    losses, _ = token_losses(model, packed())
    with torch.no_grad():
        between, _ = token_losses(model, padded())
    losses.mean().backward()
    return {"between": between} | gradients(model)


def retained_graph(model: Any) -> Answers:
    losses, _ = token_losses(model, packed())
    losses[::2].sum().backward(retain_graph=True)
    once = gradients(model)
    losses.sum().backward()
    return gradients(model) | {f"once {name}": grad for name, grad in once.items()}


def frozen_references(model: Any) -> Answers:
    model.add_adapter("reference", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    losses, _ = token_losses(model, packed())
    model.set_adapter("reference")
    with torch.no_grad():
        reference, _ = token_losses(model, packed())
    model.set_adapter("default")
    with model.disable_adapter(), torch.no_grad():
        base, _ = token_losses(model, packed())
    nn.functional.softplus(losses - reference + 0.5 * (losses - base)).sum().backward()
    return {"reference": reference, "base": base} | gradients(model)


def full_training(model: Any) -> Answers:
    model.requires_grad_(True)
    token_losses(model, packed())[0].mean().backward()
    return gradients(model)


ACTS = (two_forwards, no_grad_between, retained_graph, frozen_references, full_training)


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_graphs(name, act, monkeypatch):
    assert_same(both(monkeypatch, name, act))


# ---- hooks ----


@pytest.mark.parametrize("early", [True, False], ids=["before", "while fused"])
@pytest.mark.parametrize("name", NAMES)
def test_hooks_see_and_change_what_they_would_without(name, early, monkeypatch):
    def act(model: Any) -> Answers:
        if early:
            smidgen.unfuse(model)
        seen: Answers = {}

        def note(kind: str, path: str, values: Any) -> None:
            tensors = [x.detach().float() for x in values if isinstance(x, Tensor) and x.is_floating_point()]
            for i, x in enumerate(tensors):
                seen[f"{kind} {path} {i} {len(seen)}"] = x.flatten()

        def forward(path: str) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, output: Any) -> Any:
                note("forward", path, [*args, output])
                return output * 1.1 if isinstance(output, Tensor) and output.is_floating_point() else None

            return hook

        def backward(path: str) -> Callable[..., Any]:
            def hook(module: nn.Module, into: Any, out: Any) -> Any:
                note("backward", path, [*into, *out])
                return tuple(0.9 * g if isinstance(g, Tensor) and g.is_floating_point() else g for g in into)

            return hook

        for path, module in model.named_modules():
            if "adapters" not in path and "rotary" not in path:
                module.register_forward_hook(forward(path))
                if path.count(".") > 1:  # others answer with more than tensors
                    module.register_full_backward_hook(backward(path))
        if early:
            smidgen.fuse(model, say=quiet)
            assert not seen  # trials are not shown
        losses, _ = token_losses(model, packed())
        losses.mean().backward()
        return {"losses": losses.detach()} | gradients(model) | seen

    assert_same(both(monkeypatch, name, act))


def test_modules_that_are_off_stay_off():
    model = adapted(KINDS["llama"][0]).train()
    model.model.layers[0].eval()
    with torch.no_grad():
        smidgen.fuse(model, say=quiet)
    assert model.training and not model.model.layers[0].mlp.training and model.model.layers[1].mlp.training
    assert not any(p.grad is not None for p in model.parameters())


# ---- checkpointing and dropout ----


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_gives_the_same_to_the_bit(name, reentrant):
    model = adapted(KINDS[name][0], dropout=0.3).train()
    model.enable_input_require_grads()
    smidgen.fuse(model, say=quiet)
    for batch in (padded(), packed()):
        plain = results(model, batch)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        again = results(model, batch)
        model.gradient_checkpointing_disable()
        assert plain.keys() == again.keys()
        assert all(torch.equal(plain[key], again[key]) for key in plain)


def test_each_layer_and_step_drops_other_inputs_at_the_rate_asked_for(monkeypatch):
    drawn: list[lora.LowRank] = []
    original = lora.Lora.low_rank

    def recording(adapter: lora.Lora) -> lora.LowRank:
        drawn.append(original(adapter))
        return drawn[-1]

    monkeypatch.setattr(lora.Lora, "low_rank", recording)
    p = 0.3
    model = adapted(KINDS["llama"][0], dropout=p).train()
    smidgen.fuse(model, say=quiet)
    drawn.clear()
    for _ in range(2):
        token_losses(model, padded())
    layers = 2 * 7
    assert len(drawn) == 2 * layers and {update.p for update in drawn} == {p}
    masks = torch.stack([scaled_mask((64, 64), p, update.seed).flatten() > 0 for update in drawn]).float()
    deviation = (p * (1 - p) / masks.shape[1]) ** 0.5
    assert ((1 - masks.mean(1)) - p).abs().max() < 5 * deviation
    correlation = torch.corrcoef(masks) - torch.eye(len(masks))
    assert correlation.abs().max() < 5 / masks.shape[1] ** 0.5


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_and_not_the_number_of_threads(name):
    model = adapted(KINDS[name][0], dropout=0.3).train()
    smidgen.fuse(model, say=quiet)
    threads = torch.get_num_threads()
    found = []
    try:
        for count, seed in ((1, 3), (2, 3), (3, 3), (1, 4)):
            torch.set_num_threads(count)
            found.append(results(model, padded(), seed))
    finally:
        torch.set_num_threads(threads)
    one, *same, other = found
    assert all(torch.equal(one[key], again[key]) for again in same for key in one)
    assert not torch.equal(one["losses"], other["losses"])


# ---- what may be asked of a model ----

IDS = padded().input_ids
WHOLE = torch.ones(IDS.shape, dtype=torch.bool)
RIGHT = torch.arange(14) < torch.tensor([14, 9, 11])[:, None]
HOLES = WHOLE.clone()
HOLES[:, 4] = False
BLOCKS = torch.ones(14, 14).tril().bool() & (torch.arange(14)[:, None] // 5 == torch.arange(14) // 5)

REQUESTS: dict[str, tuple[dict[str, Any], Tensor]] = {
    "nothing": ({}, WHOLE),
    "right padding": ({"attention_mask": RIGHT.long()}, RIGHT),
    "left padding": ({"attention_mask": RIGHT.flip(1).long()}, RIGHT.flip(1)),
    "holes": ({"attention_mask": HOLES.long()}, HOLES),
    "pairs": ({"attention_mask": BLOCKS.expand(3, 1, 14, 14)}, WHOLE),
    "added to scores": (
        {"attention_mask": torch.zeros(3, 1, 14, 14).masked_fill(~BLOCKS, torch.finfo(torch.float32).min)},
        WHOLE,
    ),
    "restarting positions": ({"position_ids": torch.cat([torch.arange(5), torch.arange(9)])[None]}, WHOLE),
    "positions that jump": ({"position_ids": (torch.arange(14) + 20 * (torch.arange(14) > 6))[None]}, WHOLE),
    "hidden states": ({"output_hidden_states": True}, WHOLE),
    "attention weights": ({"output_attentions": True}, WHOLE),
}


@pytest.mark.parametrize("own", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_requests(name, own, monkeypatch):
    def act(model: Any) -> Answers:
        answers: Answers = {}
        for request, (inputs, valid) in REQUESTS.items():
            if "pairs" in request and model.config._attn_implementation.endswith("eager"):
                continue  # which adds what it is given
            model.zero_grad()
            out = model(input_ids=IDS, use_cache=False, **inputs)
            out.logits[valid].square().mean().backward()
            answers |= {f"{request}, {key}": grad for key, grad in gradients(model).items()}
            shown = {"logits": [out.logits], "states": out.get("hidden_states"), "weights": out.get("attentions")}
            for kind, tensors in shown.items():
                for i, x in enumerate(tensors or []):
                    if isinstance(x, Tensor):
                        answers[f"{request}, {kind} {i}"] = x.detach()[valid] if kind == "logits" else x.detach()
        return answers

    def with_attention(model: Any) -> Answers:
        smidgen.unfuse(model)
        model.set_attn_implementation(own)
        smidgen.fuse(model, say=quiet)
        return act(model)

    if name == "gemma2" and own == "sdpa":
        pytest.skip("transformers' sdpa knows no soft-capped scores")
    assert_same(both(monkeypatch, name, with_attention))


@pytest.mark.parametrize("name", NAMES)
def test_generation_with_a_cache(name, monkeypatch):
    def act(model: Any) -> Answers:
        model.eval()
        options = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
        left = RIGHT.flip(1).long()
        out = model.generate(IDS, attention_mask=left, **options)
        first = model(IDS[:1, :6], use_cache=True)  # and several tokens after those in the cache
        then = model(IDS[:1, 6:], past_key_values=first.past_key_values, use_cache=True)
        whole = model(IDS[:1]).logits
        torch.testing.assert_close(torch.cat([first.logits, then.logits], dim=1), whole, rtol=1e-4, atol=1e-4)
        return {"tokens": out.sequences, "scores": torch.stack(out.scores), "then": then.logits.detach()}

    expected, found = both(monkeypatch, name, act)
    assert torch.equal(expected.pop("tokens"), found.pop("tokens"))
    assert_same(iter((expected, found)))


@pytest.mark.parametrize("name", NAMES)
def test_autocast_is_as_near_to_float32_as_without(name, monkeypatch):
    def act(model: Any) -> Answers:
        with torch.autocast("cpu", torch.bfloat16):
            found = results(model, packed())
            inside = model(IDS)
        assert inside.logits.dtype == torch.bfloat16
        return found

    (exact, _), (plain, ours) = both(monkeypatch, name, lambda m: results(m, packed())), both(monkeypatch, name, act)
    keys = exact.keys() - {"rows"}

    def error(found: Answers) -> tuple[Tensor, ...]:
        squares = [torch.stack([(found[k] - exact[k]).square().sum(), exact[k].square().sum()]) for k in keys]
        return torch.stack(squares).sum(0).unbind()

    (of_plain, size), (of_ours, _) = error(plain), error(ours)
    assert of_ours / size < max(1.5 * of_plain / size, 1e-4)


# ---- what stands around a model ----


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiled(name, monkeypatch):
    def act(model: Any) -> Answers:
        run = model if kernels.instruction_set() == "reference" else torch.compile(model, backend="aot_eager")
        answers: Answers = {}
        for batch in (padded(), packed()):
            model.zero_grad()
            inputs = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
            out = run(batch.input_ids, use_cache=False, **{key: x for key, x in inputs.items() if x is not None})
            logits = out.logits[batch.labels != -100]
            logits.square().mean().backward()
            answers |= {
                f"{len(answers)} {key}": x for key, x in ({"logits": logits.detach()} | gradients(model)).items()
            }
        return answers

    assert_same(both(monkeypatch, name, act))
    torch.compiler.reset()


PROGRAM = """
import sys, torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
import smidgen
from tests.models.test_fuse_laws import NAMES, halves
from tests.models.test_fuse import KINDS, adapted
rank = int(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meeting", rank=rank, world_size=2)
found = {}
for name in NAMES:
    model = adapted(KINDS[name][0]).train()
    smidgen.fuse(model, say=lambda line: None)
    parallel = DistributedDataParallel(model)
    for inputs in halves():  # two micro-batches, the first without a sum over the processes
        inputs = {key: value[rank::2] for key, value in inputs.items()}
        parallel(**inputs).loss.backward()
    found |= {f"{name} {key}": p.grad for key, p in model.named_parameters() if p.grad is not None}
if rank == 0:
    torch.save(found, f"{sys.argv[1]}/found.pt")
distributed.destroy_process_group()
"""


def halves() -> list[dict[str, Tensor]]:
    """Two batches of four rows, each process takes two; the supervised tokens of all are as many."""
    ids = torch.randint(3, 48, (2, 4, 12), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(12) < torch.tensor([12, 12, 9, 9])[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    return [{"input_ids": ids[i], "attention_mask": mask, "labels": labels[i]} for i in range(2)]


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path):
    path = [str(Path(__file__).parents[2]), str(Path(smidgen.__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    processes = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for name in NAMES:
        model = adapted(KINDS[name][0]).train()
        for inputs in halves():
            model(**inputs).loss.backward()
        for key, gradient in gradients(model).items():
            difference = (found[f"{name} {key}"] - gradient).norm() / gradient.norm().clamp_min(1e-6)
            assert difference < 1e-4, (name, key, difference)
