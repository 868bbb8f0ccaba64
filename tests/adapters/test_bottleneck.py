"""Bottleneck adapters: each kind against its formula, computed block by block, and adapter-hub's folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import smidgen
from smidgen.adapters.attach import adapters_of
from smidgen.data.packing import Batch
from smidgen.errors import AdapterFileError, TargetError, UsageError
from smidgen.models.fuse import fused
from smidgen.models.scores import token_losses
from tests.conftest import logits, perturb, tiny_bert, tiny_gpt2, tiny_llama, tokens, toy

KINDS = ["houlsby", "pfeiffer", "parallel"]


def adapted(kind: Any, build: Any = tiny_llama) -> Any:
    torch.manual_seed(3)
    model = smidgen.get_peft_model(build(), smidgen.BottleneckConfig(kind=kind, reduction_factor=4.0)).eval()
    perturb(model, scale=0.3)
    return model


def network(model: Any, path: str) -> Any:
    adapter: Any = dict(adapters_of(model, "default"))[path]
    tensors = {name: parameter.detach() for name, parameter in adapter.named_parameters()}

    def answer(x: Tensor, activation: Any) -> Tensor:
        down = x @ tensors["adapter_down.0.weight"].T + tensors["adapter_down.0.bias"]
        return adapter.scaling * (activation(down) @ tensors["adapter_up.weight"].T + tensors["adapter_up.bias"])

    return answer


@pytest.mark.parametrize("kind", KINDS)
def test_llamas_blocks_answer_by_the_formula(kind: str) -> None:
    model, plain = adapted(kind), tiny_llama()
    activation = torch.nn.functional.silu if kind == "houlsby" else torch.relu
    ids = tokens()
    x = plain.model.embed_tokens(ids)
    turn = plain.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
    for number, layer in enumerate(plain.model.layers):
        path = f"model.layers.{number}"
        r, (h, _) = x, layer.self_attn(layer.input_layernorm(x), position_embeddings=turn, attention_mask=None)
        x = r + h + (network(model, f"{path}.self_attn.o_proj")(h, activation) if kind == "houlsby" else 0)
        r, h = x, layer.mlp(layer.post_attention_layernorm(x))
        read = {"houlsby": h, "pfeiffer": r + h, "parallel": r}[kind]
        x = r + h + network(model, f"{path}.mlp.down_proj")(read, activation)
    torch.testing.assert_close(logits(model, ids), plain.lm_head(plain.model.norm(x)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_berts_blocks_answer_by_the_formula(kind: str) -> None:
    model, plain = adapted(kind, tiny_bert), tiny_bert()
    activation = torch.nn.functional.silu if kind == "houlsby" else torch.relu
    x = plain.bert.embeddings(tokens())
    for number, layer in enumerate(plain.bert.encoder.layer):
        path = f"bert.encoder.layer.{number}"
        ends, r = layer.attention.output, x
        h = ends.dense(layer.attention.self(x)[0])
        h = h + (network(model, f"{path}.attention.output.dense")(h, activation) if kind == "houlsby" else 0)
        r = ends.LayerNorm(r + h)
        h, norm = layer.output.dense(layer.intermediate(r)), layer.output.LayerNorm
        read = {"houlsby": h, "pfeiffer": norm(r + h), "parallel": r}[kind]
        x = norm(r + h + network(model, f"{path}.output.dense")(read, activation))
    torch.testing.assert_close(logits(model, tokens()), plain.classifier(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_under_the_model_change_nothing(kind: str) -> None:
    model, ids = adapted(kind), tokens()
    batch = Batch(ids, ids.masked_fill(torch.arange(ids.shape[1]) < 2, -100), None, None, [0, 1, 2], 30)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = token_losses(model, batch)[0]
    gradients = torch.autograd.grad(expected.sum(), learned)
    with fused(model, lambda line: None):
        found = token_losses(model, batch)[0]
        others = torch.autograd.grad(found.sum(), learned)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, gradient, atol=1e-4, rtol=1e-4)


HUB = {
    "houlsby": {"mh_adapter": True, "output_adapter": True, "original_ln_before": False, "non_linearity": "swish"},
    "pfeiffer": {"mh_adapter": False, "output_adapter": True, "original_ln_before": True, "non_linearity": "relu"},
    "parallel": {"mh_adapter": False, "output_adapter": True, "original_ln_before": False, "non_linearity": "relu"},
}
PLACES = {
    tiny_llama: {"self_attn.o_proj": "attention_adapters", "mlp.down_proj": "output_adapters"},
    tiny_gpt2: {"attn.c_proj": "attention_adapters", "mlp.c_proj": "output_adapters"},
    tiny_bert: {"attention.output.dense": "attention.output", "output.dense": "output"},
}


def write_hub(folder: Path, model: Any, kind: str, places: dict[str, str], **changed: Any) -> None:
    """The folder that adapter-hub's library writes for this adapter, as its sources say."""
    tensors = {}
    for path, adapter in adapters_of(model, "default"):
        for name, parameter in adapter.named_parameters():
            layer = next(end for end in places if path.endswith(f".{end}"))
            tensors[f"{path.removesuffix(layer)}{places[layer]}.adapters.task.{name}"] = parameter.detach()
    config = {
        **HUB[kind],
        "is_parallel": kind == "parallel",
        "scaling": 4.0 if kind == "parallel" else 1.0,
        "reduction_factor": 4,
        "original_ln_after": True,
        "residual_before_ln": True,
        "adapter_residual_before_ln": False,
        "inv_adapter": None,
        "leave_out": [],
        "phm_layer": False,
        "phm_dim": 4,
        "init_weights": "bert",
    }
    fields = {"config": config | changed, "name": "task", "model_name": "tiny", "version": "adapters.1.3.0"}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "adapter.safetensors")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", PLACES, ids=lambda build: build.__name__)
def test_adapter_hubs_folders_are_read(build: Any, kind: str, tmp_path: Path) -> None:
    model = adapted(kind, build)
    write_hub(tmp_path / "hub", model, kind, PLACES[build])
    loaded = smidgen.PeftModel.from_pretrained(build(), tmp_path / "hub")
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))
    assert loaded.peft_config["default"].kind == kind


def test_parts_of_theirs_that_are_not_offered_are_named(tmp_path: Path) -> None:
    model = adapted("pfeiffer")
    for number, (changed, words) in enumerate(
        [
            ({"inv_adapter": "nice"}, "inv_adapter='nice' is not supported"),
            ({"phm_layer": True, "use_gating": True}, r"phm_layer=True is not supported\n?|use_gating=True"),
            ({"mh_adapter": True}, "fit none of houlsby, pfeiffer, parallel"),
            ({"reduction_factor": {"default": 16}}, "reduction_factor"),
            ({"scaling": "learned"}, "scaling"),
        ]
    ):
        write_hub(tmp_path / str(number), model, "pfeiffer", PLACES[tiny_llama], **changed)
        with pytest.raises(AdapterFileError, match=words):
            smidgen.PeftModel.from_pretrained(tiny_llama(), tmp_path / str(number))
    write_hub(tmp_path / "pickle", model, "pfeiffer", PLACES[tiny_llama])
    (tmp_path / "pickle" / "adapter.safetensors").rename(tmp_path / "pickle" / "pytorch_adapter.bin")
    with pytest.raises(AdapterFileError, match=r"pytorch_adapter.bin: refused unread: a pickle can run code"):
        smidgen.PeftModel.from_pretrained(tiny_llama(), tmp_path / "pickle")


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(TargetError, match=r"know the blocks of Llama, GPT-2 and BERT.*a Toy has none of these"):
        smidgen.get_peft_model(toy(), smidgen.BottleneckConfig())
    with pytest.raises(TargetError, match="leave_out: no block 2 of 2"):
        smidgen.get_peft_model(tiny_llama(), smidgen.BottleneckConfig(leave_out=[2]))
    with pytest.raises(UsageError, match="kind: no 'housby'; did you mean 'houlsby'"):
        smidgen.BottleneckConfig(kind="housby")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="non_linearity: 'rely' is none of relu"):
        smidgen.BottleneckConfig(non_linearity="rely")
