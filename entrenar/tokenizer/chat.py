"""Conversations as text: the model's own Jinja template, run in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from jinja2.parser import Parser

from entrenar.errors import TokenizerError

# For a model that brings no template: a header line for each turn, and EOS after it, so that an answer's end
# is learned.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + (eos_token or '') + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# What an expression of a template may raise on messages that it was not written for.
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
    MemoryError,
)


class _Generation(jinja2.ext.Extension):
    """``{% generation %} … {% endgeneration %}``, which marks the assistant's words: renders its body."""

    tags = {"generation"}  # noqa: RUF012  (Jinja declares it so)

    def parse(self, parser: Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(source)


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    now: datetime | None = None,
    special: Mapping[str, str] | None = None,
) -> str:
    """Text of `messages` by `template`.

    `special` are the names of special tokens that the template may use (bos_token, eos_token, pad_token); one
    that the model lacks is the empty text. Raises TokenizerError.
    """
    names = {"bos_token": "", "eos_token": "", "pad_token": "", **(special or {})}
    try:
        return _compiled(template).render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=None,
            strftime_now=lambda form: (now or datetime.now()).strftime(form),
            **names,
        )
    except jinja2.TemplateSyntaxError as e:
        raise TokenizerError(f"chat template, line {e.lineno}: {e.message}") from e
    except _TEMPLATE_FAULTS as e:
        raise TokenizerError(f"chat template on {len(messages)} messages: {type(e).__name__}: {e}") from e
