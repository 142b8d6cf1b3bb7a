"""Chat templates: the Jinja source that a model file carries, rendered as Hugging Face's transformers does.

A template comes from a downloaded file, so it runs in Jinja's immutable sandbox and on a budget: every turn of a loop,
every call of a macro, filter or method and every character is charged before it is made, and a deadline stands behind.
"""

from __future__ import annotations

import functools
import json
import re
import time
import traceback
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping, Sequence, ValuesView
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from .errors import ChatTemplateError

if TYPE_CHECKING:
    from jinja2.parser import Parser

    from .tokenizer import Tokenizer

#: Used where a model brings no template: plain roles, which a model that was never tuned to chat understands too.
DEFAULT_TEMPLATE = """\
{% for message in messages %}
{% if message.role == 'system' %}{{ message.content }}

{% else %}{{ message.role | capitalize }}: {{ message.content }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}Assistant:{% endif %}"""

MAX_WORK, MAX_SECONDS = 1 << 26, 10.0  # characters made, and 32 for each step: room for a prompt of many megabytes
_FILTERS = """abs attr count d default first float groupby int items last length list map reject rejectattr reverse
    select selectattr"""
_DEEP_FILTERS = "capitalize dictsort e escape lower max min safe sort title trim unique upper wordcount"
_DEEP_TESTS = "== != < <= > >= eq equalto ne lt lessthan le gt greaterthan ge in"
_METHODS = """capitalize count endswith find format get index isalnum isalpha isdecimal isdigit islower isnumeric
    isspace istitle isupper items join keys lower lstrip partition removeprefix removesuffix replace rfind rindex
    rpartition rsplit rstrip split splitlines startswith strip title upper values"""


class _Exhausted(Exception):
    """Not a ValueError, as some of Jinja's filters swallow those."""


_budget: ContextVar[list[float]] = ContextVar("budget")  # work left, deadline


def _charge(characters: int) -> None:
    budget = _budget.get()
    budget[0] -= characters + 32
    if budget[0] < 0:
        raise _Exhausted(f"it makes more than {MAX_WORK:,} characters or a like number of steps")
    if time.monotonic() > budget[1]:
        raise _Exhausted(f"it takes more than {MAX_SECONDS:g} s")


def _size(value: object, *, printed: bool = True) -> int:
    """About the length of str(value), found without making it; or, not `printed`, the number of values it holds."""
    total, stack = 0, [value]
    while stack and total <= MAX_WORK:
        item = stack.pop()
        if isinstance(item, (Mapping, list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)):
            total += 32 * len(item)
            stack += [*item, *item.values()] if isinstance(item, Mapping) else item
        elif not printed:
            continue
        elif isinstance(item, Namespace):
            raise _Exhausted("it prints a namespace")  # which may hold itself
        else:
            total += len(item) if isinstance(item, (str, bytes)) else 16
    return total


def _charge_format(text: str, values: Sequence[object]) -> None:
    """Each field may hold all values again, and white space up to its width."""
    if re.search(r"%[^a-zA-Z%]*(\d{4}|\*)|\{[^{}]*(\d{4}|\{)", text.replace("{{", "")):
        raise _Exhausted("a format asks for a width of 1000 or more, or computes it")
    _charge(len(text) + (text.count("{") + text.count("%")) * (1000 + _size(values)))


def _replace(text: object, old: object, new: object, count: int | None = None) -> str:
    text, old, new = _string(text), _string(old), _string(new)
    _charge(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _join(values: Iterable[object], separator: object = "", attribute: str | None = None) -> str:
    items, separator = list(values), _string(separator)
    if attribute is not None:
        items = [item.get(attribute, "") if isinstance(item, Mapping) else "" for item in items]
    _charge(_size(items) + len(separator) * len(items))
    return separator.join(map(str, items))


def _string(value: object) -> str:
    _charge(_size(value))
    return str(value)


def _indent(text: object, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    lines, prefix = _string(text).split("\n"), width if isinstance(width, str) else " " * min(width, 1000)
    _charge(len(lines) * len(prefix))
    return "\n".join(prefix + line if (first if i == 0 else line or blank) else line for i, line in enumerate(lines))


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """As transformers has it: not escaped for HTML, and readable letters stay as they are."""
    indent = None if indent is None else min(indent, 16)
    _charge(_size(value) * (1 + 8 * (indent or 0)))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    _charge_format(form, ())
    return datetime.now().strftime(form)


def _charged(function: Any, deep: bool) -> Callable[..., Any]:
    """A filter or test of Jinja's, which makes nothing longer than what it gets; `deep` ones look at all of that."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def charged(*args: Any, **kwargs: Any) -> Any:
        value = args[skipped]
        _charge(_size(args[skipped:]) if deep else len(value) if hasattr(value, "__len__") else 0)
        return function(*args, **kwargs)

    return charged


def _measured(value: object) -> object:
    _charge(_size(value, printed=False))
    return value


def _compared(value: object) -> object:
    _charge(_size(value))
    return value


class _Generation(Extension):
    """`{% generation %}` marks the model's own words for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _filtered(name: str, value: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)


class _Metered(NodeTransformer):
    """Puts a charge at the start of each body that may run many times, and around what no hook of the sandbox sees:
    `~`, comparisons, and lists, tuples and dicts (which could double the size of a nest with each step).
    """

    def visit_For(self, node: Any) -> Any:
        constant = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        charge = nodes.Call(nodes.EnvironmentAttribute("charge"), [nodes.Const(constant)], [], None, None)
        node.body.insert(0, nodes.ExprStmt(charge, lineno=node.lineno))
        return self.generic_visit(node)

    visit_Macro = visit_CallBlock = visit_Block = visit_For

    def visit_Concat(self, node: Any) -> Any:
        self.generic_visit(node)
        return _filtered("join", nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: Any) -> Any:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else _filtered("measured", node)

    visit_Tuple = visit_Dict = visit_List

    def visit_Compare(self, node: Any) -> Any:
        self.generic_visit(node)
        for operand in (node, *node.ops):
            operand.expr = _filtered("compared", operand.expr)
        return node


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])
    charge = staticmethod(_charge)

    def __init__(self) -> None:
        extensions = ["jinja2.ext.loopcontrols", _Generation]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_compared)
        builtin: Any = self.filters  # Jinja types its values as bare functions
        filters = {name: _charged(builtin[name], deep=False) for name in _FILTERS.split()}
        filters |= {name: _charged(builtin[name], deep=True) for name in _DEEP_FILTERS.split()}
        filters |= {"replace": _replace, "join": _join, "string": _string, "indent": _indent, "tojson": _tojson}
        self.filters = filters | {"measured": _measured, "compared": _compared}
        self.tests |= {name: _charged(self.tests[name], deep=True) for name in _DEEP_TESTS.split()}
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Metered().visit(super()._parse(source, name, filename))  # type: ignore[no-any-return]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _charge_format(left, right if isinstance(right, tuple) else (right,))
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            _charge(left.bit_length() * (right if operator == "**" else right.bit_length()))
        elif operator == "*" and (hasattr(left, "__len__") or hasattr(right, "__len__")):
            sequence, times = (left, right) if hasattr(left, "__len__") else (right, left)
            _charge(_size(sequence, printed=isinstance(sequence, str)) * int(times))
        else:
            _charge(sum(_size(side, printed=isinstance(side, str)) for side in (left, right)))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        if obj is _charge:
            return _charge(*args)
        _measured((args, kwargs))
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, (str, bytes, int, float, list, tuple, dict)):
            if name not in _METHODS.split():
                raise SecurityError(f"chat templates may not call {type(owner).__name__}.{name}")
            _compared(owner if isinstance(owner, str) or name in ("index", "count") else None)
        if isinstance(owner, str) and name == "format":
            _charge_format(owner, [*args, *kwargs.values()])
        elif isinstance(owner, str) and name in ("join", "replace"):
            return _join(args[0], owner) if name == "join" else _replace(owner, *args)
        return super().call(context, obj, *args, **kwargs)


class ChatTemplate:
    """A compiled chat template; `source` None stands for DEFAULT_TEMPLATE ("User: …", "Assistant: …").

    `special_tokens` are texts that the template may name: bos_token, eos_token, pad_token, unk_token.
    Raises ChatTemplateError, with the line and the reason, for a source that is not a template.
    """

    def __init__(self, source: str | None, **special_tokens: str) -> None:
        self.source = DEFAULT_TEMPLATE if source is None else source
        self._names = {"bos_token": "", "eos_token": "", **special_tokens}
        token = _budget.set([MAX_WORK, time.monotonic() + MAX_SECONDS])  # constants are folded while compiling
        try:
            self._template = _Environment().from_string(self.source)
        except Exception as error:
            raise _explained(error, "does not compile") from error
        finally:
            _budget.reset(token)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The template of a model, or the default where it has none."""
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        names = {name: tokenizer.token_bytes(i).decode("utf-8", "replace") for name, i in ids.items() if i is not None}
        return cls(tokenizer.chat_template, **names)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """The prompt for a conversation: messages of the form {"role": …, "content": …}, and whatever else (`extra`)
        the template asks for. Encode it with `parse_special=True`. Raises ChatTemplateError: line and reason.
        """
        names = {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        token = _budget.set([MAX_WORK, time.monotonic() + MAX_SECONDS])
        try:
            return "".join(self._template.generate(self._names | names | extra))
        except Exception as error:
            raise _explained(error, "fails") from error
        finally:
            _budget.reset(token)


def _explained(error: Exception, what: str) -> ChatTemplateError:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    line = getattr(error, "lineno", None) if isinstance(error, jinja2.TemplateSyntaxError) else (lines or [None])[-1]
    where = f" in line {line}" if line else ""
    return ChatTemplateError(f"the chat template {what}{where}: {error or type(error).__name__}")
