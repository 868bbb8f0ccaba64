import numpy as np
import pytest

from smidgen.data.check import CLOSE, OPEN, marked
from smidgen.data.preference import Labelled, Pair
from smidgen.data.preference_data import prepare_preferences
from smidgen.data.preference_rows import label_pieces, pair_pieces
from smidgen.data.tokenise import CHUNK, Left
from smidgen.errors import DataError
from smidgen.recipe import DataRecipe, Source
from tests.data.conftest import assistant, user
from tests.data.test_tokenise import CHAT_FAMILIES, TOKENIZERS, tokeniser

LLAMA = TOKENIZERS["llama3"]


def pair(prompt, chosen, rejected, line=1):
    prompt = [user(prompt)] if isinstance(prompt, str) else prompt
    return Pair(line, prompt, [assistant(chosen)], [assistant(rejected)])


def pieces(pairs, tokenizer=LLAMA, **options):
    maker = tokeniser(tokenizer, **options)
    return [piece for chunk in pair_pieces(maker, pairs) for piece in chunk], maker.cuts


def prepare(*paths, labelled=False, **options):
    sources = [path if isinstance(path, Source) else Source(path) for path in paths]
    data = DataRecipe(train=sources, **options)
    return prepare_preferences(data, LLAMA, labelled=labelled, stop_ids={LLAMA.eos_token_id})


@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_of_a_pair_the_last_answers_alone_are_learned(family):
    tokenizer = TOKENIZERS[family]
    prompt = [user("hello there"), assistant("I am fine"), user("how are you?")]
    found, _ = pieces([pair(prompt, "red", "blue and green")], tokenizer)
    texts = [[tokenizer.decode(piece.ids[a:b]).strip() for a, b in piece.learned] for piece in found]
    assert texts == [[f"red{tokenizer.eos_token}"], [f"blue and green{tokenizer.eos_token}"]]


def test_pieces_stay_beside_each_other_over_chunks():
    count = CHUNK // 2 + 3
    found, _ = pieces([pair("q", f"a {line}", f"b {line}", line) for line in range(count)])
    assert [piece.line for piece in found] == [line for line in range(count) for _ in range(2)]
    assert all(LLAMA.decode(piece.ids[slice(*piece.learned[0])])[0] == "ab"[at % 2] for at, piece in enumerate(found))


@pytest.mark.parametrize("order", [1, -1])
def test_a_prompt_is_cut_alike_in_both_answers(order):
    turns = [user("first " * 8), assistant("one " * 8), user("second " * 40)]
    answers = ("short", "longer than the other " * 2)[::order]
    whole, _ = pieces([pair(turns, *answers)])
    found, cuts = pieces([pair(turns, *answers)], max_length=60)
    lengths = [len(piece.ids) for piece in found]
    assert max(lengths) == 60
    prompts = [piece.ids[: piece.learned[0][0]] for piece in found]
    assert prompts[0] == prompts[1] and len(prompts[0]) < whole[0].learned[0][0]
    for before, after in zip(whole, found):
        assert before.ids[before.learned[0][0] :] == after.ids[after.learned[0][0] :]
    assert (cuts.long, cuts.turns_cut, cuts.prompt_cut, cuts.ending_lost) == (1, 1, 1, 0)


def test_pairs_that_become_the_same_by_the_cut_are_left_out_and_counted():
    same = "one two three four five six seven eight nine ten"
    found, cuts = pieces([pair("q", f"{same} yes", f"{same} no", 7)], max_length=16, on_long="truncate")
    assert found == [Left(7, "chosen and rejected are the same after the cut to max_length=16")]
    assert cuts.long == 1
    trimmed, _ = pieces([pair("q", "yes", " yes ")])  # the template trims
    assert trimmed == [Left(1, "chosen and rejected are the same tokens")]


@pytest.mark.parametrize(
    ("on_long", "reason", "mistake"),
    [
        ("truncate", "response beyond max_length=20", False),
        ("drop", "longer than max_length=20", False),
        ("error", "the row is longer than max_length=20", True),
    ],
)
def test_a_prompt_longer_than_the_limit_is_told_once(on_long, reason, mistake):
    found, _ = pieces([pair("word " * 40, "yes", "no"), pair("q", "yes", "no")], max_length=20, on_long=on_long)
    assert found[0] == Left(1, reason, mistake)
    assert len(found) == 3


def test_of_a_pair_one_long_answer_is_enough():
    found, cuts = pieces([pair("q", "yes", "no " * 40)], max_length=20, on_long="drop")
    assert found == [Left(1, "longer than max_length=20")] and cuts.dropped == 1


def test_labelled_rows_learn_the_last_answer():
    row = Labelled(3, [user("a"), assistant("b"), user("c")], [assistant("red")], True)
    ((piece,),) = label_pieces(tokeniser(LLAMA), [row])
    assert [LLAMA.decode(piece.ids[a:b]) for a, b in piece.learned] == ["red<|eot|>"]


def rows_of(count):
    return [{"prompt": f"question {n}", "chosen": f"yes {n}", "rejected": "no", "margin": n} for n in range(count)]


def test_prepared_pairs_keep_their_places_margins_and_shared_prompts(write):
    path = write([*rows_of(3), {"prompt": "q", "chosen": "", "rejected": "no"}])
    ready = prepare(path)
    assert len(ready.train) == 3 and ready.eval is None
    for index, row in enumerate(ready.train):
        assert row.chosen.where == row.rejected.where == f"{path}:{index + 1}"
        assert row.margin == index
        shared = row.chosen.prompt_length
        assert row.rejected.prompt_length == shared
        assert (row.chosen.input_ids[:shared] == row.rejected.input_ids[:shared]).all()
        assert marked(row.chosen, LLAMA).endswith(f"{OPEN}yes {index}<|eot|>{CLOSE}")
        assert marked(row.rejected, LLAMA).endswith(f"{OPEN}no<|eot|>{CLOSE}")
    assert ready.train.lengths.tolist() == [len(r.chosen.input_ids) + len(r.rejected.input_ids) for r in ready.train]
    picked = ready.train.select(np.array([2, 0]))
    assert [(row.margin, row.chosen.where[-1]) for row in picked] == [(2, "3"), (0, "1")]
    lines = ready.report.lines()
    assert lines[0].startswith("data: train 3 rows")
    assert "    1 rows left out: empty chosen (lines 4)" in lines
    assert ready.report.train.prompts == (3, 3)
    assert ready.template == LLAMA.chat_template


def test_prompts_are_held_out_whole(write):
    path = write([{**row, "prompt": f"question {number % 10}"} for number, row in enumerate(rows_of(40))])
    ready = prepare(path, eval_size=0.3, system="Be kind.")
    sides = [{marked(row.chosen, LLAMA).split(OPEN)[0] for row in side} for side in (ready.train, ready.eval)]
    assert [len(side) for side in sides] == [7, 3] and not sides[0] & sides[1]
    assert (len(ready.train), len(ready.eval)) == (28, 12)
    assert all("Be kind." in prompt for side in sides for prompt in side)
    assert ready.audit.lengths.rows == 28 and ready.audit.eval_lengths.rows == 12
    with pytest.raises(DataError, match=r"data\.eval_size: 10 leaves none of 10 prompts to train on"):
        prepare(path, eval_size=10)


def test_prepared_labelled_rows_know_their_labels(write):
    path = write(
        [{"prompt": f"q {n}", "completion": f"a {n}" if n != 1 else "", "label": n % 3 == 0} for n in range(5)]
    )
    ready = prepare(path, labelled=True)
    assert [(row.where[-1], row.desirable) for row in ready.train] == [
        ("1", True),
        ("3", False),
        ("4", True),
        ("5", False),
    ]
    picked = ready.train.select(np.array([2, 1]))
    assert picked.desirable.tolist() == [True, False] and len(picked) == 2


def test_a_mismatched_row_has_the_answer_of_the_next_other_prompt(write):
    rows = [("one", "a"), ("one", "b"), ("two three four five six", "c"), ("seven", "d e f g h i j"), ("one", "k")]
    path = write([{"prompt": prompt, "completion": answer, "label": True} for prompt, answer in rows])
    train = prepare(path, labelled=True).train
    longest = max(train.lengths)
    for row, answer in zip(train, "ccdkc"):
        mismatched = row.mismatched
        start = int(row.row.supervised.argmax())
        assert mismatched.input_ids[:start].tolist() == row.row.input_ids[:start].tolist()
        assert not mismatched.supervised[:start].any() and mismatched.supervised[start:].all()
        assert LLAMA.decode(mismatched.input_ids[start:]).strip().startswith(answer)
        assert len(mismatched.input_ids) <= longest
    assert len(train[2].mismatched.input_ids) == longest  # the long answer lost its end
    chosen = train.select(np.array([3]))
    assert chosen.mismatched[0].input_ids.tolist() == train[3].mismatched.input_ids.tolist()
    single = write([{"prompt": "one", "completion": answer, "label": True} for answer in "ab"])
    with pytest.raises(DataError, match="a single prompt"):
        prepare(single, labelled=True)


def test_mistakes_of_all_files_are_told_at_once(write):
    bad = [{"prompt": "a", "chosen": "b", "rejected": 3}]
    paths = [write(bad, "one.jsonl"), write(bad, "two.jsonl")]
    with pytest.raises(DataError) as error:
        prepare(*paths)
    assert [line.split(": ")[0] for line in str(error.value).splitlines()] == [f"{path}:1" for path in paths]
    with pytest.raises(DataError, match="preferences are not mixed by weight"):
        prepare(Source(paths[0], weight=1.0))
    with pytest.raises(DataError, match=r"data\.train_on: of preferences the answers alone are learned"):
        prepare(paths[0], train_on="all")
    with pytest.raises(DataError, match=r"data\.format: no 'pair'"):
        prepare(paths[0], format="pair")
