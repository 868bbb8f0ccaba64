"""Packed rows do not see each other: their loss is the token-weighted mean of the rows alone."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from smidgen.data.packing import micro_batches
from tests.data.test_packing import make_rows

LENGTHS = [20, 19, 21, 5]


def make_model(family, attention):
    torch.manual_seed(0)
    if family == "llama":
        config = LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            attn_implementation=attention,
        )
        return LlamaForCausalLM(config).eval()
    config = GPT2Config(
        vocab_size=40, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, attn_implementation=attention
    )
    return GPT2LMHeadModel(config).eval()


def summed_loss(model, batch):
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
    ).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("packing", [True, False])
def test_loss_and_gradient_equal_those_of_the_rows_alone(family, attention, packing):
    model, rows = make_model(family, attention), make_rows(LENGTHS, seed=3)

    def measure(batches):
        model.zero_grad()
        count = sum(batch.supervised for batch in batches)
        loss = sum(summed_loss(model, batch) for batch in batches) / count
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()]), count

    alone = [micro_batches(rows, [index], token_budget=64, packing=False, pad_id=0)[0] for index in range(len(rows))]
    together = micro_batches(
        rows, range(len(rows)), token_budget=sum(LENGTHS) if packing else 84, packing=packing, pad_id=0
    )
    assert len(together) == 1 if packing else len(together) < len(LENGTHS)
    loss, gradient, count = measure(alone)
    other_loss, other_gradient, other_count = measure(together)
    assert count == other_count
    torch.testing.assert_close(other_loss, loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(other_gradient, gradient, rtol=0, atol=1e-5)
