"""Templates render in the sandbox as transformers renders them, in any thread."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from smidgen.data import metering
from smidgen.data.metering import TemplateLimit
from smidgen.data.sandbox import Sandbox
from tests.data.conftest import GEMMA, LLAMA2, LLAMA3, QWEN3, R1, make_tokenizer

TOKENIZER = make_tokenizer("plain")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [True, None, "\u00e4"]}}}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": " hello <b> "}, {"role": "assistant", "content": "hi\n\n\u20ac"}],
    [
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "sum", "name": None},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "<think>\nso\n</think>\n\n2"},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
# What chat templates use of the language: all of it must come out as it does there.
FEATURES = (
    "{%- set ns = namespace(n=0, last='') -%}\n{%- for m in messages -%}\n    {%- if loop.first %}first {% endif %}"
    "{%- set ns.n = ns.n + 1 %}{% set ns.last = m.role ~ ns.last %}{{ loop.index0 }}/{{ loop.length }} "
    "{{ loop.revindex }} {{ loop.previtem.role if loop.previtem is defined else '-' }}\n{% endfor %}"
    "{{ ns.n }}{{ ns.last }}",
    "{% macro f(x, y='z') %}[{{ x | trim }}|{{ y }}{{ caller() if caller else '' }}]{% endmacro %}"
    "{% for m in messages if m.content %}{{ f(m.content) }}{% call f(m.role, y=1) %}c{% endcall %}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
    "{{ m.thinking }}{{ m.reasoning_content }}{% endfor %}",
    "{{ messages | map(attribute='role') | join(', ') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ messages | rejectattr('role', 'in', ['user', 'tool']) | map(attribute='content') | list | tojson }}",
    "{{ tools | tojson(indent=2) if tools else 'none' }}{{ (tools or []) | length }}{{ messages[0] | tojson }}"
    "{{ {'b': 1, 'a': [1, 2]} | tojson(sort_keys=True, separators=(',', ':')) }}{{ dict(a=1) | items | list }}",
    "{{ 'x' * 3 + 'y' }}{{ '%s-%05.1f' % ('a', 2.5) }}{{ '{}:{:>4}'.format('a', 1) }}{{ 7 // 2 ** 2 % 3 }}"
    "{{ -1 | abs }}{{ 'a,b,c'.split(',')[1:] }}{{ ['b', 'a'] | sort | first }}{{ ' ' | join(['a']) }}"
    "{{ messages[0].content[::-1] }}",
    "{% set t %}{% for m in messages %}{{ m.role | upper }};{% endfor %}{% endset %}"
    "{{ t | replace(';', '!') | indent(2) }}{{ t.startswith('U') and 'U' in t }}{{ missing | default('d') }}"
    "{{ missing is defined }}{{ none }}{{ true }}{{ 1.0 }}",
    "{% filter title %}{{ messages[0].role }}{% endfilter %}{{ bos_token }}{{ range(3) | list }}{{ [1, 2] | sum }}"
    "{{ ['a', 'A'] | unique | list }}{{ {'k': 'v'}.items() | list }}{{ '<&>' | e }}"
    "{{ [[1, 'a']] | map('first') | list }}{{ cycler('o', 'e').next() }}"
    "{% for a, b in [(1, 2)] recursive %}{{ a }}{{ b }}{% endfor %}{{ strftime_now('%Y') }}",
)


@pytest.mark.parametrize("chat", range(len(CHATS)))
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("template", [LLAMA3, GEMMA, QWEN3, R1, LLAMA2, *FEATURES])
def test_the_text_is_that_of_transformers(template: str, prompt: bool, chat: int) -> None:
    tokenizer = TOKENIZER
    tools = TOOLS if chat else None
    expected = tokenizer.apply_chat_template(
        CHATS[chat], tools=tools, chat_template=template, tokenize=False, add_generation_prompt=prompt
    )
    rendered = Sandbox(template).render(CHATS[chat], tools, prompt=prompt, special=tokenizer.special_tokens_map)
    assert rendered == expected


def test_the_bounds_are_each_chat_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "CHARACTERS", 1000)
    template = Sandbox("{{ messages[0].content }}")
    for _ in range(5):
        assert template.render([{"role": "user", "content": "x" * 900}], special={}) == "x" * 900
    with pytest.raises(TemplateLimit, match="makes more than 1,000 characters for one chat"):
        template.render([{"role": "user", "content": "x" * 1100}], special={})


def test_threads_do_not_spend_each_other_s_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "CHARACTERS", 20_000)
    template = Sandbox("{% for i in range(90) %}{{ messages[0].content ~ i }}{% endfor %}")
    chat = [{"role": "user", "content": "x" * 90}]
    expected = template.render(chat, special={})
    answers: list[object] = []

    def render() -> None:
        for _ in range(30):
            answers.append(template.render(chat, special={}))

    threads = [threading.Thread(target=render) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [expected] * 120
