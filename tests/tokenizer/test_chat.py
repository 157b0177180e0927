"""Chat templates: the settings that published templates rely on, and a sandbox around strangers' code."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from entrenar.errors import TokenizerError
from entrenar.tokenizer import Tokenizer, train_bpe
from entrenar.tokenizer.chat import DEFAULT_TEMPLATE, render

pytestmark = pytest.mark.tier1

HELLO = [{"role": "user", "content": "hi"}]


def tokenizer(template: str | None) -> Tokenizer:
    made = train_bpe(["user assistant hi " * 20], 270)
    made.chat_template = template
    return made


def test_default_template() -> None:
    turns = [*HELLO, {"role": "assistant", "content": "yo"}]
    assert tokenizer(None).apply_chat_template(turns) == "<|user|>\nhi</s>\n<|assistant|>\nyo</s>\n"
    asked = tokenizer(None).apply_chat_template(HELLO, add_generation_prompt=True)
    assert asked == "<|user|>\nhi</s>\n<|assistant|>\n"
    assert asked == tokenizer(DEFAULT_TEMPLATE).apply_chat_template(HELLO, add_generation_prompt=True)


@pytest.mark.parametrize("template", ["{{ bos_token }}{{ messages[0].content }}", "{{ messages[0].content }}"])
def test_exactly_one_bos(template: str) -> None:
    made = tokenizer(template)
    assert made.encode_chat(HELLO) == [made.bos_id, *made.encode("hi", add_special=False)]


def test_no_bos_where_the_model_wants_none() -> None:
    made = tokenizer("{{ messages[0].content }}")
    made.add_bos = False
    assert made.encode_chat(HELLO) == made.encode("hi", add_special=False)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),  # blocks leave no blank line behind
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i > 2 %}{% break %}{% endif %}{{ i }}"
         "{% endfor %}", "02"),
        ('{{ {"b": "é<", "a": 1} | tojson }}', '{"b": "é<", "a": 1}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ('{{ strftime_now("%d %b %Y") }}', "05 Mar 2021"),
        ("{% generation %}{{ messages[0]['role'] }}{% endgeneration %}", "user"),
        ("{{ tools[0].name if tools else 'none' }}", "f"),
        ("{{ eos_token }}{{ pad_token }}|", "</s>|"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
    ],
)  # fmt: skip
def test_what_published_templates_use(template: str, expected: str) -> None:
    got = render(template, HELLO, tools=[{"name": "f"}], now=datetime(2021, 3, 5), special={"eos_token": "</s>"})
    assert got == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("a\n{% if %}", "line 2"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError|unsafe"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe|SecurityError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ missing.field }}", "missing"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ open('/etc/passwd') }}", "'open' is undefined"),
        ("{% include 'x' %}", "no loader"),
    ],
)
def test_faults_and_attacks_are_typed(template: str, reason: str) -> None:
    with pytest.raises(TokenizerError, match=reason) as error:
        render(template, HELLO)
    assert str(error.value).startswith("chat template")


def test_messages_are_not_changed_by_a_template() -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
    with pytest.raises(TokenizerError):
        render("{{ messages[0].update({'content': 'x'}) }}", messages)
    assert messages == HELLO
