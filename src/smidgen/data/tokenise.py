"""From examples to token ids and the mask of the learned tokens: the one way for train, eval, chat and serving.

A text is tokenised once, as a whole; which tokens are learned is read off the character positions of the turns, after
anything was cut. Special tokens come from the template; BOS is put first where the tokenizer wants it and the template
wrote none; EOS ends a text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, NamedTuple

from smidgen.data.formats import Example, Message
from smidgen.data.images import BadImage, ImageReader
from smidgen.data.rows import COMPLETE, ENDING_LOST, PROMPT_CUT, TEXT
from smidgen.data.templates import ChatTemplate, Rendered, choose_template
from smidgen.errors import DataError

CHUNK = 1000  # rows rendered and tokenised in one call


class Piece(NamedTuple):
    """A tokenised row: ids, learned ranges of tokens (first, end), line, how much of it is left, paths of images."""

    ids: list[int]
    learned: list[tuple[int, int]]
    line: int
    state: int
    images: tuple[str, ...] = ()


class Left(NamedTuple):
    """A row that gives no piece, and why; `mistake`: nothing may be trained until it is mended."""

    line: int
    reason: str
    mistake: bool = False


class Encoded(NamedTuple):
    """A tokenised row with labels, or one window of a long one.

    spans: of each token of the context of a question, the characters it stands for; None for all other tokens.
    """

    ids: list[int]
    second: list[bool]
    labels: list[int]
    spans: list[tuple[int, int] | None]


@dataclass
class Cuts:
    """What became of rows longer than `max_length`, and how many answers could not be found in their rendering."""

    long: int = 0
    prompt_cut: int = 0
    turns_cut: int = 0
    ending_lost: int = 0
    end_cut: int = 0
    nothing_left: int = 0
    dropped: int = 0
    split: int = 0
    pieces: int = 0
    tokens_lost: int = 0
    not_found: int = 0


class Encoder:
    """A fast tokenizer, used without its own padding, truncation and special tokens.

    Raises:
        DataError: the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"{type(tokenizer).__name__} is not a fast tokenizer (one with a tokenizer.json), so a turn cannot be "
                "found among its tokens"
            )
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        with_special = self._backend.encode("a").ids
        bos = tokenizer.bos_token_id
        self.bos: int | None = bos if bos is not None and with_special[:1] == [bos] else None
        self.eos: int | None = tokenizer.eos_token_id

    def encode(self, texts: list[str]) -> list[Any]:
        """Tokenise texts, which hold their special tokens; `with_bos` completes the ids."""
        return self._backend.encode_batch(texts, add_special_tokens=False)

    def fingerprint(self) -> str:
        """A hash of the whole tokenizer."""
        return hashlib.blake2b(self._backend.to_str().encode()).hexdigest()

    def with_bos(self, ids: list[int]) -> list[int]:
        """Put BOS first where the tokenizer wants it and it is not there."""
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]


def encode_prompt(
    messages: list[Message],
    tokenizer: Any,
    *,
    template: str | None = None,
    tools: list[Any] | None = None,
    thinking: bool = False,
) -> list[int]:
    """Answer the token ids of a chat up to where the model's answer begins, the same as in training.

    Args:
        template: text of the chat template; None: the tokenizer's own, else the Alpaca prompt.
        thinking: leave it to a reasoning model to think first, instead of answering at once.

    Raises:
        DataError: the template refuses the messages.
    """
    chosen = ChatTemplate(tokenizer, template, "template") if template else choose_template(tokenizer, None, "alpaca")
    return encode_text(chosen.prompt(messages, tools, thinking=thinking), tokenizer)


def encode_text(text: str, tokenizer: Any) -> list[int]:
    """Answer the token ids of a text that is to be continued, with the one BOS that the tokenizer wants."""
    encoder = Encoder(tokenizer)
    return encoder.with_bos(encoder.encode([text])[0].ids)


class Tokeniser:
    """Examples to pieces.

    template: how chats are written; None where there are only texts.
    stop_ids: the tokens that end an answer; the first of them after an answer is learned with it.
    learn_all: every token of a chat is learned, not the answers alone.
    on_long: what happens to a chat longer than `max_length` tokens: see `_shorten`. A long text is split, unless
        `on_long` is 'drop', 'truncate' or 'error'. A row with images is never cut, but left out.
    images: puts the tokens of images into their places; None: the model takes none.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: ChatTemplate | None,
        *,
        stop_ids: set[int],
        learn_all: bool,
        max_length: int,
        on_long: str,
        images: ImageReader | None = None,
    ) -> None:
        self.images = images
        self.template, self.stop_ids, self.learn_all = template, stop_ids, learn_all
        self.max_length, self.on_long = max_length, on_long
        self.encoder = Encoder(tokenizer)
        self.cuts = Cuts()

    def pieces(self, examples: Iterable[Example]) -> Iterator[list[Piece | Left]]:
        """Tokenise chunk by chunk; while one chunk is tokenised (outside the interpreter lock) the next is rendered."""
        examples = iter(examples)
        with ThreadPoolExecutor(1) as pool:
            waiting = None
            while chunk := list(islice(examples, CHUNK)):
                rendered = self._render(chunk)
                texts = [chat.text for chat in rendered if isinstance(chat, Rendered)]
                encodings = pool.submit(self.encoder.encode, texts)
                if waiting:
                    yield self._finish(*waiting)
                waiting = (chunk, rendered, encodings)
            if waiting:
                yield self._finish(*waiting)

    def single(self, example: Example) -> Piece | Left:
        """Tokenise one chat."""
        return next(self.pieces([example]))[0]

    def prompt(self, messages: list[Message], tools: list[Any] | None = None, images: Sequence[str] = ()) -> list[int]:
        """The ids of a chat up to where its answer begins."""
        assert self.template is not None
        ids = self.encoder.with_bos(self.encoder.encode([self.template.prompt(messages, tools)])[0].ids)
        return self.images.expand(ids, [], images)[0] if self.images else ids

    def _render(self, chunk: Sequence[Example]) -> list[Rendered | str]:
        chats = [example for example in chunk if example.text is None]
        if chats:
            assert self.template is not None
            written = iter(self.template.render(chats))
        return [next(written) if example.text is None else Rendered(example.text, []) for example in chunk]

    def _finish(self, chunk: Sequence[Example], rendered: list[Rendered | str], encodings: Any) -> list[Piece | Left]:
        found: list[Piece | Left] = []
        encoded = iter(encodings.result())
        for example, chat in zip(chunk, rendered, strict=True):
            if isinstance(chat, str):
                found.append(Left(example.line, f"the chat template refuses it: {chat}"))
            elif example.text is not None:
                found += self._text_pieces(example, next(encoded))
            else:
                found.append(self._chat_piece(example, chat, next(encoded)))
        return found

    def _text_pieces(self, example: Example, encoding: Any) -> list[Piece | Left]:
        ids = self.encoder.with_bos(encoding.ids)
        if self.encoder.eos is not None and ids[-1:] != [self.encoder.eos]:
            ids.append(self.encoder.eos)
        limit, line = self.max_length, example.line
        if len(ids) < 2:
            return [Left(line, "nothing but one token")]
        if self.images and self.images.token_id in ids:
            return [Left(line, f"the text holds {self.images.token}, which stands for an image", mistake=True)]
        if len(ids) > limit:
            self.cuts.long += 1
            if self.on_long in ("drop", "error"):
                return [self._refuse(line, ids)]
            if self.on_long == "truncate":
                self._count_lost(ids)
                ids = ids[:limit]
            else:
                self.cuts.split += 1
                self.cuts.pieces += -(-len(ids) // limit)
        starts = list(range(0, len(ids), limit))
        if len(ids) - starts[-1] == 1:  # one token alone could not be learned: nothing predicts it
            starts[-1] -= 1
        parts = [ids[start:end] for start, end in pairwise([*starts, len(ids)])]
        return [Piece(part, [(0, len(part))], line, TEXT) for part in parts]

    def _chat_piece(self, example: Example, chat: Rendered, encoding: Any) -> Piece | Left:
        ids, learned = self._learned(chat, encoding)
        self.cuts.not_found += chat.lost
        if not learned:
            return Left(example.line, "the template rewrites its assistant turns" if chat.lost else "no assistant turn")
        if example.images and not self.images:
            return Left(
                example.line,
                "the row has images, and the model takes none, or its processor is not at hand",
                mistake=True,
            )
        if self.images:
            try:
                ids, learned = self.images.expand(ids, learned, example.images)
            except BadImage as problem:
                return Left(example.line, str(problem), mistake=True)
        return self.fit(example, Piece(ids, learned, example.line, COMPLETE, example.images))

    def fit(self, example: Example, piece: Piece, excess: int = 0) -> Piece | Left:
        """Bring a tokenised chat down to `max_length`; `excess`: see `_shorten`."""
        over = len(piece.ids) - self.max_length
        if max(over, excess) <= 0:
            return piece
        self.cuts.long += over > 0
        if self.on_long in ("drop", "error") or example.images:
            return self._refuse(example.line, piece.ids)
        ids, learned, state = self._shorten(example, piece, max(over, excess))
        if not learned:
            self.cuts.nothing_left += 1
            return Left(example.line, f"response beyond max_length={self.max_length}")
        return Piece(ids, learned, example.line, state)

    def _learned(self, chat: Rendered, encoding: Any) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids with BOS, and the ranges of tokens that are learned."""
        ids = self.encoder.with_bos(encoding.ids)
        shift = len(ids) - len(encoding)
        ranges = []
        for span in chat.spans:
            first = shift + _token_at(encoding, span.start, len(chat.text))
            answered = shift + _token_at(encoding, span.content_end, len(chat.text))
            end = shift + _token_at(encoding, span.end, len(chat.text))
            stop = next((at for at in range(answered, end) if ids[at] in self.stop_ids), None)
            end = end if stop is None else stop + 1
            if first < end:
                ranges.append((first, end))
        if self.learn_all:
            return ids, [(0, ranges[-1][1] if ranges else len(ids))]
        return ids, ranges

    def _refuse(self, line: int, ids: list[int]) -> Left:
        self.cuts.dropped += 1
        self.cuts.tokens_lost += len(ids)
        if self.on_long == "error":
            return Left(line, f"the row is longer than max_length={self.max_length}", mistake=True)
        return Left(line, f"longer than max_length={self.max_length}")

    def _count_lost(self, ids: list[int]) -> None:
        self.cuts.ending_lost += 1
        self.cuts.tokens_lost += len(ids) - self.max_length

    def _shorten(self, example: Example, piece: Piece, excess: int) -> tuple[list[int], list[tuple[int, int]], int]:
        """Bring a chat down to `max_length`.

        'truncate' cuts the end. 'truncate_prompt' first leaves out the oldest exchanges as wholes, then the beginning
        of the longest message that is not an answer (of which a quarter of `max_length` stays), and the end at last.

        Args:
            excess: how many tokens the prompt is to lose: as many as are too many here, or in the longer of two rows
                with the same prompt, so that it stays the same in both.
        """
        ids, learned, state = piece.ids, piece.learned, COMPLETE
        if self.on_long == "truncate_prompt":
            before, fits = len(ids), len(ids) - excess
            chat = example.messages
            while len(ids) > fits and (shorter := _without_oldest(chat)):
                chat = shorter
                ids, learned = self._again(example._replace(messages=chat))
                state = PROMPT_CUT
            self.cuts.turns_cut += state == PROMPT_CUT
            if len(ids) > fits and not self.learn_all:
                cut_ids, cut_learned = self._cut_prompt(example._replace(messages=chat), ids, learned, len(ids) - fits)
                if len(cut_ids) < len(ids):
                    ids, learned, state = cut_ids, cut_learned, PROMPT_CUT
                    self.cuts.prompt_cut += 1
            self.cuts.tokens_lost += before - len(ids)
        if len(ids) > self.max_length:
            self.cuts.tokens_lost += len(ids) - self.max_length
            ids, state = ids[: self.max_length], ENDING_LOST
            learned = [(first, min(end, len(ids))) for first, end in learned if first < len(ids)]
            self.cuts.ending_lost += bool(learned)
        return ids, learned, state

    def _again(self, example: Example) -> tuple[list[int], list[tuple[int, int]]]:
        assert self.template is not None
        chat = self.template.render([example])[0]
        if isinstance(chat, str):
            return [], []
        return self._learned(chat, self.encoder.encode([chat.text])[0])

    def _cut_prompt(
        self, example: Example, ids: list[int], learned: list[tuple[int, int]], excess: int
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Take up to `excess` tokens from the beginning of the longest message that is not an answer."""
        assert self.template is not None
        chat = self.template.render([example])[0]
        longest = max((m["content"].strip() for m in example.messages if m["role"] != "assistant"), key=len, default="")
        if isinstance(chat, str) or not longest or (place := chat.text.find(longest)) < 0:
            return ids, learned
        encoding = self.encoder.encode([chat.text])[0]
        shift = len(ids) - len(encoding)
        first = shift + _token_at(encoding, place, len(chat.text))
        end = shift + _token_at(encoding, place + len(longest), len(chat.text))
        cut = min(excess, end - first - self.max_length // 4)
        if cut <= 0 or any(start < end and first < stop for start, stop in learned):
            return ids, learned
        moved = [(a - cut, b - cut) if a >= end else (a, b) for a, b in learned]
        return ids[:first] + ids[first + cut :], moved


def _token_at(encoding: Any, char: int, length: int) -> int:
    """The first token of the text from `char` on; characters that belong to no token (white space) are skipped."""
    while char < length:
        if (token := encoding.char_to_token(char)) is not None:
            return token
        char += 1
    return len(encoding)


def _without_oldest(messages: list[Message]) -> list[Message] | None:
    """The chat without its oldest exchange; None where only one is left. The system message stays."""
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if len(users) < 2 or not any(message["role"] == "assistant" for message in messages[users[1] :]):
        return None
    return [*messages[: users[0]], *messages[users[1] :]]
