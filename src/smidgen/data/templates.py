"""The text of a chat, and which part of it is learned.

A `ChatTemplate` renders messages in the sandbox of `data.sandbox`, within bounds. Where a turn begins is found by
rendering the messages before it, up to the header of the answer; so no template needs `{% generation %}`. What a
template writes between that header and the answer (an empty think block) belongs to the prompt, and `prompt` writes it
too: chat and serving start exactly where training started.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from smidgen.data.formats import Example, Message
from smidgen.data.images import in_parts
from smidgen.data.messages import common_start
from smidgen.data.metering import TemplateLimit
from smidgen.data.sandbox import LONGEST_TEMPLATE, Sandbox
from smidgen.errors import DataError
from smidgen.foreign import read_text, shown

# For tokenizers that have no template of their own. Alpaca's wording: https://github.com/tatsu-lab/stanford_alpaca
ALPACA = """\
{%- set has_system = messages[0]['role'] == 'system' -%}
{{- messages[0]['content'] if has_system else 'Below is an instruction that describes a task. \
Write a response that appropriately completes the request.' -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '\\n\\n### Response:\\n' + message['content'] + eos_token -}}
{%- elif message['role'] != 'system' -%}
{{- '\\n\\n### Instruction:\\n' + message['content'] -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\\n\\n### Response:\\n' -}}{%- endif -%}
"""

# Prompt, then completion, with a line break between them unless the prompt already ends in white space.
PLAIN = """\
{%- for message in messages -%}
{{- message['content'] -}}
{%- if message['role'] == 'assistant' -%}{{- eos_token -}}
{%- elif message['content'][-1:] not in [' ', '\\n', '\\t'] -%}{{- '\\n' -}}
{%- endif -%}
{%- endfor -%}
"""

_QUESTION = "1 + 1?"
_ANSWER = "\u2021 two \u2021"  # a text that no template writes by itself
_SYSTEM = "\u2021 system \u2021"


class Span(NamedTuple):
    """A learned turn, in characters: its answer is text[start:content_end]; the template closes it before `end`."""

    start: int
    content_end: int
    end: int


class Rendered(NamedTuple):
    """A chat as text, with the spans of its assistant turns, and how many of these could not be found."""

    text: str
    spans: list[Span]
    lost: int = 0


class ChatTemplate:
    """A Jinja chat template and a tokenizer's special tokens.

    text: the template itself, to be stored beside what was trained with it.
    origin: where it is from, in words.
    closing: what it writes after an answer.

    Raises:
        DataError: the template cannot render a question and an answer, or goes beyond the bounds of the sandbox.
    """

    def __init__(self, tokenizer: Any, text: str, origin: str) -> None:
        self.text, self.origin, self._special = text, origin, tokenizer.special_tokens_map
        self._parts, self._takes_parts = False, False
        try:
            self._sandbox = Sandbox(text)
            # Templates of models that take images may read the content of messages as a list of parts, some only so.
            self._takes_parts = self._writes_answer(parts=True)
            self._parts = self._takes_parts and not self._writes_answer(parts=False)
            header = self._render([_user(_QUESTION)], prompt=True)
            whole = self._render([_user(_QUESTION), {"role": "assistant", "content": _ANSWER}])
        except Exception as error:  # a template is foreign code: what it may raise is open
            raise DataError(f"{origin}: the template cannot render a question and its answer: {_told(error)}") from None
        answer = whole.find(_ANSWER)
        if answer < 0:
            raise DataError(f"{origin}: the template does not write the assistant's answer")
        shared = common_start(header[:answer], whole)
        between = whole[shared:answer]
        # White space alone is left to the answer: tokenizers join it to the first word.
        self._opening, self._gap = (between, "") if between.strip() else ("", between)
        # What the header has beyond the start of a plain answer: '<think>' of templates that open the reasoning.
        self._header_extra = header[shared:]
        self.closing = whole[answer + len(_ANSWER) :]
        self.shows_calls = "tool_calls" in text
        self.takes_system = self._shows_system()

    def render(self, examples: Sequence[Example]) -> list[Rendered | str]:
        """Render chats; a chat that the template refuses is answered as the refusal's words.

        Raises:
            DataError: the template goes beyond the bounds of the sandbox.
        """
        chats = [self._fit(example.messages) for example in examples]
        tools = [example.tools for example in examples]
        answers: list[Rendered | str] = [
            Rendered(text, []) if isinstance(text, str) else _told(text) for text in self._render_each(chats, tools)
        ]
        # Other learned turns are found by the header before each; the headers of all chats are rendered in one call.
        heads: list[tuple[int, int]] = []
        last: dict[int, Span] = {}
        for index, (chat, rendered) in enumerate(zip(chats, answers, strict=True)):
            if isinstance(rendered, Rendered):
                turns = [
                    turn
                    for turn, message in enumerate(chat)
                    if message["role"] == "assistant" and message.get("weight") != 0
                ]
                if turns and turns[-1] == len(chat) - 1 and (span := self._last_span(rendered.text, chat[-1])):
                    last[index] = span
                    turns.pop()
                heads += [(index, turn) for turn in turns]
        prefixes = self._render_each(
            [chats[index][:turn] for index, turn in heads], [tools[index] for index, _ in heads], prompt=True
        )
        for (index, turn), prefix in zip(heads, prefixes, strict=True):
            rendered = answers[index]
            assert isinstance(rendered, Rendered)
            span = None
            if isinstance(prefix, str):
                span = self._span(rendered.text, prefix, chats[index], turn, tools[index])
            if span:
                rendered.spans.append(span)
            else:
                answers[index] = rendered._replace(lost=rendered.lost + 1)
        for index, span in last.items():
            answers[index].spans.append(span)  # type: ignore[union-attr]
        return answers

    def prompt(self, messages: list[Message], tools: list[Any] | None = None, *, thinking: bool = False) -> str:
        """Render a chat up to where the assistant's answer begins, as in training.

        Args:
            thinking: end with the template's own header, so that a reasoning model may think first.

        Raises:
            DataError: the template refuses the chat.
        """
        try:
            text = self._render(self._fit(messages), tools, prompt=True)
        except Exception as error:
            raise DataError(f"the chat template refuses these messages: {_told(error)}") from None
        return text if thinking else self._answer_start(text)

    def _answer_start(self, header: str) -> str:
        return header.removesuffix(self._header_extra) + self._opening

    def _last_span(self, text: str, message: Message) -> Span | None:
        """Where the last turn stands, when the text ends with its content and the closing that every answer gets."""
        if "tool_calls" in message:
            return None
        content_end = len(text) - len(self.closing)
        for content in _trimmings(message["content"]):
            if text.endswith(content + self.closing):
                start = content_end - len(content)
                if text.endswith(self._gap, 0, start):
                    start -= len(self._gap)
                return Span(start, content_end, len(text))
        return None

    def _span(self, text: str, prefix: str, chat: list[Message], turn: int, tools: list[Any] | None) -> Span | None:
        """Where in `text` the assistant's turn stands, given the rendering `prefix` of all that is before it."""
        header = prefix.removesuffix(self._header_extra)
        if not text.startswith(header):
            return None
        start = len(header)
        if self._opening and text.startswith(self._opening, start):
            start += len(self._opening)
        first = start + len(self._gap) if text.startswith(self._gap, start) else start
        for content in _trimmings(chat[turn]["content"]):
            if text.startswith(content + self.closing, first):
                content_end = first + len(content)
                return Span(start, content_end, content_end + len(self.closing))
        # The template writes the answer in its own way: with tool calls, without its reasoning.
        end = self._turn_end(text, start, chat, turn, tools)
        return Span(start, start, end) if end and text[start:end].strip() else None

    def _turn_end(self, text: str, start: int, chat: list[Message], turn: int, tools: list[Any] | None) -> int | None:
        """Where a turn ends: where its own rendering does, or with the closing that comes before the next message."""
        if turn + 1 == len(chat):
            return len(text)
        through = self._render(chat[: turn + 1], tools)
        if text.startswith(through):
            return len(through)
        following = text.find(chat[turn + 1]["content"].strip(), start)
        closing = text.find(self.closing, start, max(0, following)) if self.closing.strip() else -1
        return closing + len(self.closing) if closing >= 0 else None

    def _fit(self, messages: list[Message]) -> list[Message]:
        """Put into the messages what the template would not show: a system message, tool calls."""
        if messages[0]["role"] == "system" and not self.takes_system and len(messages) > 1:
            system, first, *rest = messages
            messages = [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]
        if not self.shows_calls and any("tool_calls" in message for message in messages):
            messages = [_calls_as_text(message) for message in messages]
        return messages

    def _writes_answer(self, parts: bool) -> bool:
        """Whether content may be a text, or a list of parts: then it is not written as the list stands."""
        chat = [_user(_QUESTION), {"role": "assistant", "content": _ANSWER}]
        try:
            text = self._sandbox.render([in_parts(turn) if parts else turn for turn in chat], special=self._special)
        except TemplateLimit:
            raise
        except Exception:  # a list where a text was expected may raise anything
            return False
        return _ANSWER in text and not ("'type'" in text or '"type"' in text)

    def _shows_system(self) -> bool:
        try:
            text = self._render([{"role": "system", "content": _SYSTEM}, _user(_QUESTION)], prompt=True)
        except Exception:  # many templates refuse by raising
            return False
        return _SYSTEM in text

    def _render_each(
        self, chats: list[list[Message]], tools: list[list[Any] | None], *, prompt: bool = False
    ) -> list[str | Exception]:
        answers: list[str | Exception] = []
        for chat, its_tools in zip(chats, tools, strict=True):
            try:
                answers.append(self._render(chat, its_tools, prompt=prompt))
            except TemplateLimit as error:  # a template that does so for one chat may do so for each
                raise DataError(f"{self.origin}: the template is stopped: {error}") from None
            except Exception as error:
                answers.append(error)
        return answers

    def _render(self, chat: list[Message], tools: list[Any] | None = None, *, prompt: bool = False) -> str:
        if self._takes_parts:
            chat = [in_parts(message) if self._parts or "images" in message else message for message in chat]
        return self._sandbox.render(chat, tools, prompt=prompt, special=self._special)


def choose_template(tokenizer: Any, path: str | None, style: str) -> ChatTemplate:
    """Answer the template at `path`, else the tokenizer's own, else ours of that style ('alpaca' or 'plain').

    Raises:
        DataError: the file cannot be read, or the template cannot render a chat.
    """
    if path is not None:
        return ChatTemplate(tokenizer, read_text(Path(path), DataError, 4 * LONGEST_TEMPLATE), path)
    if tokenizer.chat_template:
        return ChatTemplate(tokenizer, own_template(tokenizer), "the tokenizer's chat template")
    return ChatTemplate(tokenizer, ALPACA if style == "alpaca" else PLAIN, f"built-in {style} template")


def own_template(tokenizer: Any) -> str:
    """Answer the text of the tokenizer's own chat template, the one called 'default' where it has several.

    Raises:
        DataError: none of its templates is called so.
    """
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(f"the tokenizer's chat template: {error}") from None


def _told(error: Exception) -> str:
    """What a template raised; the words may be the template's own."""
    return shown(str(error) or type(error).__name__)


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _trimmings(content: str) -> list[str]:
    """The ways in which templates trim a message, the whole first; none for an empty one."""
    bare = content.strip()
    if bare == content or not bare:
        return [bare] if bare else []
    return [content, bare, content.lstrip(), content.rstrip(), content.lstrip("\n"), content.strip("\n")]


def _calls_as_text(message: Mapping[str, Any]) -> Message:
    import json

    calls = [call["function"] for call in message.get("tool_calls", ())]
    text = "\n".join(json.dumps(call, ensure_ascii=False) for call in calls)
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": "\n".join(part for part in (message["content"], text) if part)}
