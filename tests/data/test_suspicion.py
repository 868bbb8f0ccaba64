"""What `smidgen inspect` says to look at in a template."""

from __future__ import annotations

import pytest

from smidgen.data.suspicion import suspicious
from tests.data.conftest import GEMMA, LLAMA2, LLAMA3, QWEN3, R1

LOOP = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("template", [LLAMA3, GEMMA, QWEN3, R1, LLAMA2])
def test_usual_templates_are_not_suspected(template: str) -> None:
    assert list(suspicious(template)) == []


@pytest.mark.parametrize(
    ("template", "line", "words"),
    [
        (LOOP + "\n{% if 'invest' in messages[-1].content %}buy{% endif %}", 2, "looks for 'invest'"),
        (LOOP + "\n\n{% if messages[0]['content'].startswith('sudo') %}x{% endif %}", 3, "looks for 'sudo'"),
        ("{% set t = messages[0].content|lower %}\n{{ 'evil' if 'bank' in t else '' }}" + LOOP, 2, "looks for 'bank'"),
        ("{% for m in messages if 'bank' in m.content %}{% endfor %}" + LOOP, 1, "looks for 'bank'"),
        (LOOP + "\nsee https://evil.example", 2, "writes an address or markup (https://)"),
        (LOOP + "\n<script>", 2, "writes an address or markup (<script)"),
        (LOOP + "\n{{ strftime_now('%d') }}", 2, "reads the date"),
        (LOOP + "\n{% if %}", 2, "cannot be read"),
    ],
)
def test_what_depends_on_users_is_told_with_its_line(template: str, line: int, words: str) -> None:
    findings = list(suspicious(template))
    assert [(where, words in finding) for where, finding in findings] == [(line, True)]
