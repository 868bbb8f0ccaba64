from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from smidgen.models.generate import generate_batch, stream
from smidgen.models.load import load_model

PROMPTS = [[50, 60, 70], [80], [90, 91, 92, 93, 94, 95], [40, 41], [3, 4, 5, 6]]


@pytest.fixture(scope="module")
def loaded(folder: Path):
    return load_model(folder, "float32", device=torch.device("cpu"), say=lambda line: None)


def greedy(model, prompt: list[int], steps: int, stops: set[int]) -> list[int]:
    """The plain definition: the likeliest next token, again and again, without cache or padding."""
    ids, made = list(prompt), []
    with torch.no_grad():
        for _ in range(steps):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token in stops:
                break
            ids.append(token)
            made.append(token)
    return made


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_batches_answer_as_each_prompt_alone(loaded, batch_size: int):
    model, tokenizer = loaded
    free = [greedy(model, prompt, 12, set()) for prompt in PROMPTS]
    stops = {free[0][4], free[3][2]}  # some answers end early
    expected = [greedy(model, prompt, 12, stops) for prompt in PROMPTS]
    assert len({len(answer) for answer in expected}) > 1
    found = generate_batch(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size, stop_ids=stops)
    assert found == expected


def test_nothing_is_warned_and_the_model_stays_as_it_was(loaded, capfd: pytest.CaptureFixture[str]):
    model, tokenizer = loaded
    model.train()
    model.generation_config.temperature = 0.3  # a default of the model file that greedy decoding would complain about
    defaults = model.generation_config.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate_batch(model, tokenizer, PROMPTS, max_new_tokens=3)
        generate_batch(model, tokenizer, PROMPTS, max_new_tokens=3, do_sample=True, temperature=0.7, top_p=0.9)
    assert model.training and model.generation_config.to_dict() == defaults
    assert capfd.readouterr() == ("", "")
    model.eval()


def test_sampling_follows_the_seed_and_is_not_greedy(loaded):
    model, tokenizer = loaded

    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return generate_batch(model, tokenizer, PROMPTS, max_new_tokens=12, do_sample=True, temperature=2.0)

    assert sample(0) == sample(0) != sample(1)


def test_a_stream_is_the_answer_in_pieces(loaded):
    model, tokenizer = loaded
    [answer] = generate_batch(model, tokenizer, PROMPTS[:1], max_new_tokens=20)
    pieces = list(stream(model, tokenizer, PROMPTS[0], max_new_tokens=20))
    assert "".join(pieces) == tokenizer.decode(answer, skip_special_tokens=True)


def test_an_error_in_the_stream_reaches_the_caller(loaded):
    model, tokenizer = loaded
    with pytest.raises(IndexError):
        list(stream(model, tokenizer, [10**6], max_new_tokens=4))


def test_leaving_a_stream_ends_the_generation(loaded):
    model, tokenizer = loaded
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    hook = model.register_forward_hook(count)
    pieces = stream(model, tokenizer, PROMPTS[0], max_new_tokens=400, stop_ids={258})
    next(pieces)
    pieces.close()
    hook.remove()
    assert 0 < steps < 400
