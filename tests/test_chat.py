import json
import os
import re
import time
from pathlib import Path

import jinja2
import pytest
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hipquant import chat
from hipquant.chat import DEFAULT_TEMPLATE, ChatTemplate
from hipquant.errors import ChatTemplateError

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <é>"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Bye"},
]
CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def render(source, messages=MESSAGES, **extra):
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(messages, **extra)


def test_default_template():
    text = "Be brief.\n\nUser: Hi <é>\nAssistant: Yo\nUser: Bye\n"
    assert ChatTemplate(None).render(MESSAGES) == text + "Assistant:"
    assert ChatTemplate(None).render(MESSAGES, add_generation_prompt=False) == text
    assert ChatTemplate(None).source == DEFAULT_TEMPLATE


def test_chatml():
    assert render(CHATML, MESSAGES[1:2]) == "<|im_start|>user\nHi <é><|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}|{{ eos_token }}", "<s>|</s>"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),  # trim_blocks and lstrip_blocks
        ("{{ {'a': 'é<'} | tojson }}", '{"a": "é<"}'),
        ("{{ {'b': 1, 'a': [1]} | tojson(indent=2) }}", '{\n  "b": 1,\n  "a": [\n    1\n  ]\n}'),
        ("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=true) }}", '{"a":2,"b":1}'),
        ("{% for m in messages %}{% if loop.index0 == 2 %}{% break %}{% endif %}{{ m.role[0] }}{% endfor %}", "su"),
        ("{% for m in messages if m.role == 'user' %}{{ loop.last }}{{ loop.length }} {% endfor %}", "False2 True2 "),
        ("{% generation %}a{% endgeneration %}", "a"),
        ("{{ strftime_now('%Y') }}", time.strftime("%Y")),
        ("{{ strftime_now('%d of 2024') | length }}", "10"),
        ("{{ none }}{{ x }}{{ x is defined }}{{ tools }}", "NoneFalseNone"),
        ("{% set ns = namespace(n=1) %}{% for i in range(5) %}{% set ns.n = ns.n * 2 %}{% endfor %}{{ ns.n }}", "32"),
        ("{% macro m(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{% endmacro %}{{ m(1) }}", "12()"),
        ("{{ messages[1:] | map(attribute='role') | join(', ') }}", "user, assistant, user"),
        ("{{ messages | map(attribute='role') | list | length }}{{ [{'a': 1}] | join('', 'a') }}", "41"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "2"),
        ("{{ 'a-b'.split('-') | join('+') }}{{ 'aa'.replace('a', 'b', 1) }}{{ 'x' ~ 1 ~ [2] }}", "a+bbax1[2]"),
        ("{{ '{} {{}} {:>3}'.format('é', 7) }}{{ '%s=%5.2f' % ('a', 1.5) }}", "é {}   7a= 1.50"),
        ("{{ '-'.join(['a', 'b'] | map('upper')) }}{{ 'a\nb' | indent(2) }}|{{ 'a\nb' | indent('>', true) }}",
         "A-Ba\n  b|>a\n>b"),
        ("{% for k, v in {'x': 1}.items() %}{{ k }}{{ v }}{% endfor %}{% set a, b = 1, 2 %}{{ (a, b) }}", "x1(1, 2)"),
        ("{{ 'a' in 'ab' }}{{ 1 < 2 < 2 }}{{ [1] + [2] }}{{ [0] * 2 }}{{ 7 % 4 }}", "TrueFalse[1, 2][0, 0]3"),
        ("{{ [3, 1] | sort | first }}{{ ' a ' | trim }}{{ 'a' | upper }}{{ x | default('d') }}", "1aAd"),
        ("{{ documents }}{{ enable_thinking }}", "None"),
    ],
)  # fmt: skip
def test_what_templates_use(source, text):
    assert render(source) == text


class Generation(Extension):
    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def plain_render(source, **names):
    """By Jinja's sandbox as it is, with what transformers adds."""

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": time.strftime}
    return environment.from_string(source).render(**names)


FUNCTION = {
    "name": "weather",
    "description": "Of a city <é>",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "which"}},
        "required": ["city"],
    },
}
CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "abcdef123", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    ],
}
ANSWERED = {"role": "tool", "tool_call_id": "abcdef123", "name": "weather", "content": "sunny"}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYo", "reasoning_content": "hm"}
CONVERSATIONS = {
    "a question": MESSAGES[1:2],
    "a conversation": MESSAGES,
    "no system": MESSAGES[1:],
    "a call": [MESSAGES[1], CALLED, ANSWERED],
    "thinking": [MESSAGES[1], THOUGHT, MESSAGES[3]],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "Look"}]}],
}  # fmt: skip
TEMPLATES = sorted(Path(os.environ.get("HIPQUANT_VOCABS") or "/none").glob("templates/*.jinja"))


@pytest.mark.skipif(not TEMPLATES, reason="HIPQUANT_VOCABS does not name models/ of llama.cpp, with its templates/")
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_templates_of_models_are_rendered_as_by_a_plain_sandbox(path):
    """The limits stop none of them, and a template that refuses a conversation refuses it with the same words."""
    source = path.read_text()
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    for messages in CONVERSATIONS.values():
        for tools in (None, [{"type": "function", "function": FUNCTION}]):
            names = {"messages": messages, "tools": tools, "add_generation_prompt": True, "documents": None}
            try:
                expected = plain_render(source, bos_token="<s>", eos_token="</s>", **names)
            except Exception as error:
                with pytest.raises(ChatTemplateError, match=re.escape(str(error))):
                    template.render(messages, tools=tools)
            else:
                assert template.render(messages, tools=tools) == expected


def test_extra_names_and_tools():
    source = "{{ enable_thinking }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    assert render(source, enable_thinking=False, tools=[{"name": "f"}]) == 'False{"name": "f"}'


def test_of_a_tokenizer():
    class Stub:
        chat_template, bos_id, eos_id = "{{ bos_token }}.{{ eos_token }}", 1, None

        def token_bytes(self, token):
            return b"<bos>"

    assert ChatTemplate.of(Stub()).render([]) == "<bos>."


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("\n\n{{ raise_exception('roles must alternate') }}", "fails in line 3: roles must alternate"),
        ("a\n{% for %}", "does not compile in line 2: Expected an expression"),
        ("a\n{{ x | nonsense }}", "does not compile in line 2: No filter named 'nonsense'"),
        ("\n{{ x.y }}", "fails in line 2: 'x' is undefined"),
        ("{% macro m() %}\n{{ x.y }}\n{% endmacro %}\n{{ m() }}", "fails in line 2: 'x' is undefined"),
        ("\n{{ 1 / 0 }}", "fails in line 2: division by zero"),
        ("{% include 'x' %}", "fails in line 1: no loader"),
        ("{{ ''.__class__ }}{{ ''.__class__.mro() }}", "fails in line 1: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "fails in line 1: access to attribute 'append'"),
        ("{{ messages[0].update(role='x') }}", "fails in line 1: access to attribute 'update'"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
    ],
)
def test_errors_name_the_line(source, message):
    with pytest.raises(ChatTemplateError) as error:
        render(source)
    assert message in str(error.value)
    assert MESSAGES[0] == {"role": "system", "content": "Be brief."}


GROW = "{% set ns = namespace(a=['a'], b=['a'], s='aa') %}{% for i in range(60) %}STEP{% endfor %}USE"
HOSTILE = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}" + "y" * 10_000 + "{% endfor %}",
    "{% set x %}{% for i in range(99999) %}" + "y" * 100_000 + "{% endfor %}{% endset %}",
    "{{ range(10**9) }}",
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ 10**(10**10) }}",
    "{{ ['a' * 1000000] * 99999 }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 999999999) }}",
    "{{ ('{0}' * 100000).format('a' * 100000) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ ('%s' * 100000) % (('a' * 100000,) * 100000) }}",
    "{{ 'a'.center(10**9) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ 'a'.zfill(10**9) }}",
    "{{ 'a'.expandtabs(10**9) }}",
    "{{ 'a'.translate({97: 'b'}) }}",
    "{{ (1).to_bytes(10**9, 'big') }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a' | batch(10**9, 'a') | list }}",
    "{{ ('a\n' * 100000) | indent('b' * 100000) }}",
    "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "{{ ('b' * 1000000).join(['a'] * 1000000) }}",
    "{{ ['a'] * 1000000 | join('b' * 1000000) }}",
    "{{ (['a' * 10000000] * 99999) | map('upper') | list | length }}",
    "{{ ['a' * 1000000 ~ 'b'] * 99999 == ['a' * 1000000 ~ 'b'] * 99999 }}",
    "{{ (['a' * 1000000 ~ 'b'] * 99999) | select('equalto', 'a' * 1000000 ~ 'c') | list }}",
    "{{ (['a' * 1000000] * 1000) | string | length }}",
    "{{ (['a' * 1000000] * 1000) | tojson | length }}",
    "{{ (['a' * 1000000] * 1000) | upper | length }}",
    "{{ strftime_now('%999999999d') }}",
    "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% for x in [1, 1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "{% set ns = namespace(s=1) %}{% set ns.s = ns %}{{ ns }}",
    "{% set ns = namespace(a=2) %}{% for i in range(60) %}{% set ns.a = ns.a * ns.a %}{% endfor %}",
    GROW.replace("STEP", "{% set ns.s = ns.s ~ ns.s %}"),
    GROW.replace("STEP", "{% set ns.s = ns.s + ns.s %}"),
    GROW.replace("STEP", "{% set ns.s = ns.s.join(['', '', '']) %}{% set ns.s = ns.s.replace('a', 'aa') %}"),
    GROW.replace("STEP", "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"),
    GROW.replace("STEP", "{% set ns.a = [ns.a] * 2 %}{% set ns.b = [ns.b] * 2 %}").replace("USE", "{{ ns.a == ns.b }}"),
    GROW.replace("STEP", "{% set ns.a = [ns.a, ns.a] %}").replace("USE", "{{ ns.a | upper }}"),
    GROW.replace("STEP", "{% set ns.a = (ns.a, ns.a) %}").replace("USE", "{{ ns.a | tojson }}"),
    GROW.replace("STEP", "{% set ns.a = [ns.a] * 2 %}").replace("USE", "{{ 'x' ~ ns.a }}"),
    GROW.replace("STEP", "{% set ns.a = ns.a + ns.a %}").replace("USE", "{{ ns.a | string }}"),
    GROW.replace("STEP", "{% set ns.a = dict(a=ns.a, b=ns.a) %}").replace("USE", "{{ ns.a }}"),
    GROW.replace("STEP", "{% set ns.a = {1: ns.a, 2: ns.a} %}").replace("USE", "{{ '%s' % ns.a }}"),
    "{% macro m() %}{% set ns.a = varargs %}{% endmacro %}" + GROW.replace("STEP", "{{ m(ns.a, ns.a) }}"),
    "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "{{ " + "[" * 100_000,
    "{% if 1 %}" * 3000,
]


@pytest.mark.parametrize("source", HOSTILE, ids=lambda source: source[:60])
def test_hostile_templates_end_soon(source, monkeypatch):
    monkeypatch.setattr(chat, "MAX_WORK", 1 << 23)  # an eighth of the real budget keeps the tests quick
    start = time.perf_counter()
    with pytest.raises(ChatTemplateError) as error:
        render(source)
    assert time.perf_counter() - start < 3
    assert not isinstance(error.value.__cause__, MemoryError)


def test_deadline(monkeypatch):
    monkeypatch.setattr(chat, "MAX_WORK", 1 << 60)
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.2)
    start = time.perf_counter()
    with pytest.raises(ChatTemplateError, match=r"takes more than 0\.2 s"):
        render(HOSTILE[0])
    assert time.perf_counter() - start < 2


def test_a_long_conversation_is_within_the_budget():
    messages = [{"role": role, "content": "word " * 400} for _ in range(500) for role in ("user", "assistant")]
    last = "{% if loop.index == messages | length %}!{% endif %}{%- endfor"
    text = render(CHATML.replace("{%- endfor", last), messages)
    assert len(text) > 2_000_000
    assert text.count("!") == 1
    appended = "{% set ns = namespace(all=[]) %}{% for m in messages %}{% set ns.all = ns.all + [m] %}{% endfor %}"
    assert render(appended + "{{ ns.all | length }}", messages[:500]) == "500"
