import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smidgen.data.formats import Example
from smidgen.data.rows import COMPLETE, ENDING_LOST, PROMPT_CUT, TEXT
from smidgen.data.templates import ChatTemplate, choose_template
from smidgen.data.tokenise import Left, Piece, Tokeniser, encode_prompt, encode_text
from smidgen.errors import DataError
from tests.data.conftest import FAMILIES, make_tokenizer

TOKENIZERS = {family: make_tokenizer(family) for family in FAMILIES}
CHAT_FAMILIES = [family for family in FAMILIES if family != "plain"]


def tokeniser(tokenizer, *, max_length=1000, on_long="truncate_prompt", style="alpaca", learn_all=False, template=None):
    return Tokeniser(
        tokenizer,
        template or choose_template(tokenizer, None, style),
        stop_ids={tokenizer.eos_token_id},
        learn_all=learn_all,
        max_length=max_length,
        on_long=on_long,
    )


def chat(*turns, system=None, line=1, tools=None):
    messages = [{"role": "system", "content": system}] if system else []
    for index, content in enumerate(turns):
        messages.append({"role": "assistant" if index % 2 else "user", "content": content})
    return Example(line, messages, None, tools)


def learned(tokenizer, piece):
    """The text of each learned range."""
    return [tokenizer.decode(piece.ids[first:end]) for first, end in piece.learned]


@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_exactly_the_answers_and_their_end_of_turn_are_learned(family):
    tokenizer = TOKENIZERS[family]
    piece = tokeniser(tokenizer).single(chat("one?", "two", "and user?", "assistant"))
    assert isinstance(piece, Piece) and piece.state == COMPLETE
    texts = [text.strip() for text in learned(tokenizer, piece)]
    assert texts == [f"two{tokenizer.eos_token}", f"assistant{tokenizer.eos_token}"]
    assert all(piece.ids[end - 1] == tokenizer.eos_token_id for _, end in piece.learned)


def test_an_empty_think_block_is_prompt_and_a_real_one_is_learned():
    tokenizer = TOKENIZERS["qwen3"]
    plain = tokeniser(tokenizer).single(chat("q", "think"))
    assert learned(tokenizer, plain) == ["think<|e|>"]
    assert tokenizer.decode(plain.ids[: plain.learned[0][0]]).endswith("assistant\n<think>\n\n</think>\n\n")
    reasoned = tokeniser(tokenizer).single(chat("q", "<think>\nwhy\n</think>\n\nso"))
    assert learned(tokenizer, reasoned) == ["<think>\nwhy\n</think>\n\nso<|e|>"]
    # Reasoning of an earlier turn is left out by the template: the rest of that turn is learned.
    two = tokeniser(tokenizer).single(chat("q", "<think>\nwhy\n</think>\n\nso", "r", "then"))
    assert learned(tokenizer, two) == ["so<|e|>", "then<|e|>"]


def test_an_answer_that_looks_like_the_template_is_found_at_its_place():
    for family in CHAT_FAMILIES:
        tokenizer = TOKENIZERS[family]
        for answer in ("a", "user", "assistant", "model", "think", "</think", "\n x", "eot", "two two"):
            piece = tokeniser(tokenizer).single(chat("assistant", answer, answer, answer))
            if "</think" in answer or not isinstance(piece, Piece):
                continue
            assert [text.strip() for text in learned(tokenizer, piece)] == [
                f"{answer.strip()}{tokenizer.eos_token}"
            ] * 2, (family, answer)


def test_pad_equal_to_eos_still_learns_to_stop():
    tokenizer = TOKENIZERS["llama3"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    piece = tokeniser(tokenizer).single(chat("hi", "yo"))
    assert piece.learned[-1][1] == len(piece.ids) and piece.ids[-1] == tokenizer.eos_token_id


def test_system_messages_go_into_the_first_turn_where_a_template_takes_none():
    tokenizer = TOKENIZERS["gemma"]
    piece = tokeniser(tokenizer).single(chat("q", "two", system="Be brief"))
    assert "<start>user\nBe brief\n\nq<end>" in tokenizer.decode(piece.ids)
    assert encode_prompt(chat("q", system="Be brief").messages, tokenizer) == piece.ids[: piece.learned[0][0]]


def test_tool_calls_are_learned_in_the_template_s_way_or_as_json():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "one"},
    ]
    written = '{"name": "add", "arguments": {"a": 1}}'
    qwen, llama = TOKENIZERS["qwen3"], TOKENIZERS["llama3"]
    assert learned(llama, tokeniser(llama).single(Example(1, messages))) == [f"{written}<|eot|>", "one<|eot|>"]
    first = tokeniser(qwen).single(Example(1, messages[:2]))
    assert learned(qwen, first)[0].endswith(f"<call>{written}</call><|e|>")


def test_a_weight_of_zero_leaves_a_turn_out():
    tokenizer = TOKENIZERS["llama3"]
    example = chat("a", "first", "b", "second")
    example.messages[1]["weight"] = 0
    assert learned(tokenizer, tokeniser(tokenizer).single(example)) == ["second<|eot|>"]


def test_a_template_that_refuses_a_chat_leaves_it_out_and_says_why():
    tokenizer = TOKENIZERS["llama3"]
    refusal = "{% if messages | length > 2 %}{{ raise_exception('one exchange only') }}{% endif %}"
    template = ChatTemplate(tokenizer, tokenizer.chat_template + refusal, "t")
    left, kept = next(tokeniser(tokenizer, template=template).pieces([chat(*"abcd"), chat("a", "b")]))
    assert isinstance(left, Left) and "one exchange only" in left.reason
    assert isinstance(kept, Piece)


def test_templates_that_cannot_be_used_are_refused():
    tokenizer = TOKENIZERS["llama3"]
    with pytest.raises(DataError, match="x: the template cannot render"):
        ChatTemplate(tokenizer, "{{ raise_exception('no') }}", "x")
    with pytest.raises(DataError, match="does not write the assistant's answer"):
        ChatTemplate(tokenizer, "{{ messages[0]['content'] }}", "x")
    with pytest.raises(DataError, match=r"nowhere\.jinja: no such file"):
        choose_template(tokenizer, "nowhere.jinja", "alpaca")


def test_built_in_templates_for_tokenizers_without_one():
    tokenizer = TOKENIZERS["plain"]
    alpaca = tokeniser(tokenizer).single(chat("Add", "3", system="Be kind"))
    assert tokenizer.decode(alpaca.ids) == "<bos>Be kind\n\n### Instruction:\nAdd\n\n### Response:\n3<eos>"
    assert learned(tokenizer, alpaca) == ["3<eos>"]
    plain = tokeniser(tokenizer, style="plain")
    assert tokenizer.decode(plain.single(chat("q", "a")).ids) == "<bos>q\na<eos>"
    assert tokenizer.decode(plain.single(chat("q ", "a")).ids) == "<bos>q a<eos>"
    assert learned(tokenizer, plain.single(chat("q", "a"))) == ["a<eos>"]


TEXT_ALPHABET = string.ascii_letters + string.digits + " .,?!\n\t\u00e9\u00df\u4e2d\U0001f600<>|"
contents = st.text(TEXT_ALPHABET, min_size=1, max_size=30).filter(lambda text: text.strip())
turns = st.lists(contents, min_size=2, max_size=6).map(lambda items: items[: len(items) // 2 * 2])


@settings(max_examples=60, deadline=None)
@given(family=st.sampled_from(FAMILIES), turns=turns, text=contents)
def test_one_bos_on_every_path_and_the_same_prompt_in_chat_as_in_training(family, turns, text):
    tokenizer = TOKENIZERS[family]
    wanted = 0 if family == "qwen3" else 1
    train = tokeniser(tokenizer).single(chat(*turns))
    assert isinstance(train, Piece)
    prompt = encode_prompt(chat(*turns[:-1]).messages, tokenizer)
    plain = tokeniser(tokenizer).single(Example(1, [], text))
    for ids in (train.ids, prompt, plain.ids, encode_text(text, tokenizer)):
        assert ids.count(tokenizer.bos_token_id) == wanted if wanted else tokenizer.bos_token_id is None
        assert ids[:1] == [tokenizer.bos_token_id] or not wanted
    # The learned part of the last turn decodes to its content; the prompt is what stands before it. A token that joins
    # the header's last characters with the answer's first (white space) belongs to the answer.
    first, end = train.learned[-1]
    answer = tokenizer.decode(train.ids[first:end])
    assert answer.endswith(tokenizer.eos_token)
    assert answer.removesuffix(tokenizer.eos_token).strip() == turns[-1].strip()
    if not turns[-1][0].isspace() and family != "llama2":
        assert prompt == train.ids[:first]


@settings(max_examples=60, deadline=None)
@given(
    family=st.sampled_from(CHAT_FAMILIES),
    turns=turns,
    max_length=st.integers(8, 60),
    on_long=st.sampled_from(["truncate", "truncate_prompt", "drop"]),
)
def test_masks_hold_after_cutting(family, turns, max_length, on_long):
    tokenizer = TOKENIZERS[family]
    whole = tokeniser(tokenizer).single(chat(*turns))
    maker = tokeniser(tokenizer, max_length=max_length, on_long=on_long)
    piece = maker.single(chat(*turns))
    if len(whole.ids) <= max_length:
        assert piece == whole and maker.cuts.long == 0
        return
    assert maker.cuts.long == 1
    if isinstance(piece, Left):
        assert maker.cuts.dropped + maker.cuts.nothing_left == 1
        return
    assert len(piece.ids) <= max_length
    assert all(0 <= first < end <= len(piece.ids) for first, end in piece.learned)
    kept = [piece.ids[first:end] for first, end in piece.learned]
    answers = [whole.ids[first:end] for first, end in whole.learned]
    if piece.state == ENDING_LOST:
        assert maker.cuts.ending_lost == 1
        *full, cut = kept
        assert any(answer[: len(cut)] == cut for answer in answers)
        assert all(answer in answers for answer in full)
    else:
        # The oldest answers may be gone, and think blocks move with the last turn; what is learned ends as it did.
        assert piece.state == PROMPT_CUT
        assert kept[-1] == answers[-1]
        assert piece.ids[0] == whole.ids[0]


def test_long_prompts_give_way_before_answers_and_the_question_stays():
    tokenizer = TOKENIZERS["llama3"]
    maker = tokeniser(tokenizer, max_length=60)
    piece = maker.single(chat("the quick brown fox " * 20 + "what is it?", "Paris"))
    assert len(piece.ids) == 60 and piece.state == PROMPT_CUT
    assert learned(tokenizer, piece) == ["Paris<|eot|>"]
    assert "what is it?" in tokenizer.decode(piece.ids)
    assert (maker.cuts.prompt_cut, maker.cuts.ending_lost) == (1, 0)


def test_whole_exchanges_go_first_and_the_system_message_stays():
    tokenizer = TOKENIZERS["llama3"]
    whole = tokeniser(tokenizer).single(chat("old " * 30, "answer", "new", "Paris", system="Be kind"))
    maker = tokeniser(tokenizer, max_length=len(whole.ids) - 1)
    piece = maker.single(chat("old " * 30, "answer", "new", "Paris", system="Be kind"))
    assert piece == tokeniser(tokenizer).single(chat("new", "Paris", system="Be kind"))._replace(state=PROMPT_CUT)
    assert maker.cuts.turns_cut == 1


def test_texts_are_split_and_nothing_is_lost():
    tokenizer = TOKENIZERS["plain"]
    maker = tokeniser(tokenizer, max_length=7)
    text = "hello there, how are you today? " * 3
    pieces = next(maker.pieces([Example(3, [], text)]))
    joined = [token for piece in pieces for token in piece.ids]
    assert tokenizer.decode(joined) == f"<bos>{text}<eos>"
    assert {piece.state for piece in pieces} == {TEXT} and {piece.line for piece in pieces} == {3}
    assert (maker.cuts.split, maker.cuts.pieces) == (1, len(pieces))
    assert all(piece.learned == [(0, len(piece.ids))] for piece in pieces)


def test_everything_is_learned_on_request():
    tokenizer = TOKENIZERS["llama3"]
    piece = tokeniser(tokenizer, learn_all=True).single(chat("a", "b"))
    assert piece.learned == [(0, len(piece.ids))]


def test_slow_tokenizers_are_refused():
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="Slow is not a fast tokenizer"):
        encode_text("a", Slow())


def test_white_space_around_an_answer_never_hides_its_end():
    for family in CHAT_FAMILIES:
        tokenizer = TOKENIZERS[family]
        piece = tokeniser(tokenizer).single(chat("q", " \n two \n\n\n     \n", "r", "\n  three      \n\n"))
        assert [piece.ids[end - 1] for _, end in piece.learned] == [tokenizer.eos_token_id] * 2, family
        assert ["".join(text.split()) for text in learned(tokenizer, piece)] == [
            f"two{tokenizer.eos_token}",
            f"three{tokenizer.eos_token}",
        ], family
