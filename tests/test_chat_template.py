"""`Tokenizer.apply_chat_template` against Jinja2, over generated conversations.

The oracle is Jinja2 set up as Transformers sets it up for chat templates. Where it renders, ours must give
the same text; where it raises, ours must raise a ValueError.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
import qwen35rs
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE = (Path(__file__).parent.parent / "src" / "tokenizer" / "qwen3_5.jinja").read_text(encoding="utf-8")

# Values printed bare and through tojson, methods with and without arguments, white space, scopes.
PRINTING = """\
{%- set ns = namespace(n=0) %}
{%- for m in messages %}
    {%- set c = m.content %}
    {%- if c is string %}
        {%- set c = c.strip() ~ '|' ~ c.rstrip('\\n') ~ '|' ~ c|trim %}
        {%- set ns.n = ns.n + c|length %}
    {%- endif %}
    {{- loop.index }}:{{ m.role }}:{{ m|tojson }}:{{ c if c is string else '' }}
    {%- for call in m.tool_calls or [] %}
        {%- for key, value in (call.function or call).arguments|items %}
 {{ key }}={{ value if value is not mapping and value is not sequence else '' }}/{{ value|string if value is number else '' }}
        {%- endfor %}
    {%- endfor %}
{% endfor %}
{{ ns.n }} {{ tools|tojson(indent=1) if tools else tools }} {{ missing }}
"""


def oracle(template: str, **variables: Any) -> str:
    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    return env.from_string(template).render(**variables)


def write_tokenizer(directory: Path, template: str) -> None:
    tiny.write_tokenizer(directory)
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    directory = tmp_path_factory.mktemp("family")
    write_tokenizer(directory, TEMPLATE)
    return qwen35rs.Tokenizer.from_pretrained(str(directory))


@pytest.fixture(scope="module")
def printing(tmp_path_factory):
    directory = tmp_path_factory.mktemp("printing")
    write_tokenizer(directory, PRINTING)
    return qwen35rs.Tokenizer.from_pretrained(str(directory))


words = st.sampled_from(
    ["a", "B c", " ", "\n", "\n\n", "\t", "<think>", "</think>", "<tool_response>", "</tool_response>"]
    + ["é", "😀", "\u00a0", "\u0085", "\x1c", "\u2028", '"', "'", "\\", "<&>", "{{ x }}", "{% if %}", "0"]
)
text = st.lists(words, max_size=6).map("".join) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=8
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([0.0, -0.0, 1e15, 1e16, 1e-4, 1e-5, 1e22, 123456789012345678.0])
    | text
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
parts = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": text}),
    st.fixed_dictionaries({"type": st.just("image")}),
    st.fixed_dictionaries({"type": st.just("image_url"), "image_url": st.just({"url": "u"})}),
    st.fixed_dictionaries({"type": st.just("video")}),
    st.fixed_dictionaries({"video": text, "text": text}),
    st.fixed_dictionaries({"type": st.just("audio")}),
)
content = text | text | st.lists(parts, max_size=3) | st.none()
functions = st.fixed_dictionaries(
    {"name": text}, optional={"arguments": st.dictionaries(text, values, max_size=3)}
)
calls = functions | st.fixed_dictionaries({"function": functions}, optional={"id": text, "type": text})
messages = st.one_of(
    st.fixed_dictionaries({"role": st.just("user"), "content": content}),
    st.fixed_dictionaries({"role": st.just("user"), "content": text}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": content},
        optional={
            "reasoning_content": text | st.none(),
            "tool_calls": st.lists(calls, max_size=3) | st.none(),
        },
    ),
    st.fixed_dictionaries({"role": st.just("tool"), "content": content}, optional={"tool_call_id": text}),
    st.fixed_dictionaries({"role": st.sampled_from(["system", "developer"]), "content": content}),
)
system = st.lists(st.fixed_dictionaries({"role": st.just("system"), "content": text}), max_size=1)
conversations = st.builds(lambda a, b: a + b, system, st.lists(messages, max_size=6))
tools = st.none() | st.lists(st.dictionaries(text, values, max_size=3), max_size=2)

many = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def compare(tokenizer, template: str, conversation, tools, generate: bool, kwargs: dict[str, Any]) -> None:
    def ours() -> str:
        return tokenizer.apply_chat_template(
            conversation, tools=tools, add_generation_prompt=generate, tokenize=False, **kwargs
        )

    try:
        expected = oracle(
            template, messages=conversation, tools=tools, add_generation_prompt=generate, **kwargs
        )
    except (jinja2.exceptions.TemplateError, TypeError, ValueError):
        with pytest.raises(ValueError):
            ours()
    else:
        assert ours() == expected


@many
@given(conversations, tools, st.booleans(), st.booleans(), st.booleans())
def test_family_template(family, conversation, tools, generate, thinking, vision_id):
    kwargs = {"enable_thinking": thinking, "add_vision_id": vision_id}
    compare(family, TEMPLATE, conversation, tools, generate, kwargs)


@many
@given(conversations, tools)
def test_printing(printing, conversation, tools):
    compare(printing, PRINTING, conversation, tools, False, {"enable_thinking": True})


def test_arguments_as_json_text(family):
    def render(arguments):
        return family.apply_chat_template(
            [
                {"role": "user", "content": "w?"},
                {"role": "assistant", "content": "", "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
                ]},
            ],
            add_generation_prompt=False,
            tokenize=False,
        )  # fmt: skip

    assert render('{"a": 1.0, "b": [true, "é"]}') == render({"a": 1.0, "b": [True, "é"]})
    assert render("") == render({})
    for bad in ["{", "[]", "1", "a"]:
        with pytest.raises(ValueError, match=r"messages\[1\]\.tool_calls\[0\]\.function\.arguments"):
            render(bad)


@pytest.mark.parametrize(
    "conversation, field",
    [
        ([{"role": "user", "content": "a"}, {"content": "b"}], r"messages\[1\]\.role"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content"),
        (["a"], r"messages\[0\]"),
    ],
)
def test_misshapen_conversations_name_the_message(family, conversation, field):
    with pytest.raises(ValueError, match=field):
        family.apply_chat_template(conversation, tokenize=False)
