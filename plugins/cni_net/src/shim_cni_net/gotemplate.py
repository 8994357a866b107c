"""Go's text/template, as far as templates of network configurations use it.

``{{.Field}}``, ``{{$variable}}``, ``{{.}}``, ``{{range .List}}``, ``{{range $i, $item := .List}}``, ``{{if}}``,
``{{with}}``, ``{{else}}``, ``{{end}}``, comments, and ``{{-``/``-}}`` that take blanks away. Templates written for
containerd's ``conf_template`` render unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Value = str | Sequence[str]

_ACTION = re.compile(r"\{\{(-(?=\s))?\s*(/\*.*?\*/|[^{}]*?)\s*(?:(?<=\s)(-))?\}\}", re.DOTALL)
_OPERAND = re.compile(r"\.[A-Za-z_]\w*|\.|\$\w*(?:\.[A-Za-z_]\w*)?")
_RANGE = re.compile(r"(?:(?:(\$\w+)\s*,\s*)?(\$\w+)\s*:=\s*)?(\S+)")
_MAX_DEPTH = 32


class TemplateError(Exception):
    """The template can't be rendered: the text says where, and what is wrong."""


@dataclass(slots=True)
class _Node:
    """Text, or an action with what stands inside it."""

    kind: str
    text: str = ""
    line: int = 0
    body: list[_Node] = field(default_factory=list)
    otherwise: list[_Node] = field(default_factory=list)


def render(template: str, values: Mapping[str, Value]) -> str:
    """The template with its fields filled in.

    :param values: what ``{{.Name}}`` stands for.
    :raises TemplateError: an action isn't known, or a field isn't.
    """
    out: list[str] = []
    _render(_parse(template), values, values, {"$": values}, out)
    return "".join(out)


def _parse(template: str) -> list[_Node]:
    root = _Node("root")
    open_nodes: list[tuple[_Node, list[_Node]]] = [(root, root.body)]
    position, trim = 0, False
    for match in _ACTION.finditer(template):
        text = template[position : match.start()]
        text = text.lstrip() if trim else text
        text = text.rstrip() if match[1] else text
        open_nodes[-1][1].append(_Node("text", text))
        position, trim = match.end(), bool(match[3])
        line = template.count("\n", 0, match.start()) + 1
        action = match[2].strip()
        if action.startswith("/*"):
            continue
        word, _, rest = action.partition(" ")
        node, into = open_nodes[-1]
        if word in ("range", "if", "with"):
            child = _Node(word, rest.strip(), line)
            into.append(child)
            open_nodes.append((child, child.body))
            if len(open_nodes) > _MAX_DEPTH:
                raise TemplateError(f"line {line}: nested too deeply")
        elif word in ("else", "end") and rest:
            raise TemplateError(f"line {line}: {{{{{action}}}}} is not supported")
        elif word == "else" and into is node.body and node is not root:
            open_nodes[-1] = (node, node.otherwise)
        elif word == "end" and node is not root:
            open_nodes.pop()
        elif _OPERAND.fullmatch(action):
            into.append(_Node("value", action, line))
        else:
            raise TemplateError(f"line {line}: {{{{{action[:40]}}}}} is not supported")
    if len(open_nodes) > 1:
        node = open_nodes[-1][0]
        raise TemplateError(f"line {node.line}: {{{{{node.kind}}}}} has no {{{{end}}}}")
    tail = template[position:]
    if "{{" in tail:
        line = template.count("\n", 0, position + tail.index("{{")) + 1
        raise TemplateError(f"line {line}: unclosed action")
    root.body.append(_Node("text", tail.lstrip() if trim else tail))
    return root.body


def _render(
    nodes: Sequence[_Node], values: Mapping[str, Value], dot: object, variables: Mapping[str, object], out: list[str]
) -> None:
    for node in nodes:
        if node.kind == "text":
            out.append(node.text)
        elif node.kind == "value":
            value = _lookup(node.text, node, dot, variables)
            if not isinstance(value, str | int):
                raise TemplateError(f"line {node.line}: {node.text} is a list: use {{{{range}}}}")
            out.append(str(value))
        elif node.kind == "range":
            _render_range(node, values, dot, variables, out)
        else:
            value = _lookup(node.text, node, dot, variables)
            inner = value if node.kind == "with" and value else dot
            _render(node.body if value else node.otherwise, values, inner, variables, out)


def _render_range(
    node: _Node, values: Mapping[str, Value], dot: object, variables: Mapping[str, object], out: list[str]
) -> None:
    match = _RANGE.fullmatch(node.text)
    if match is None:
        raise TemplateError(f"line {node.line}: {{{{range {node.text[:40]}}}}} is not supported")
    index_name, item_name, operand = match.groups()
    items = _lookup(operand, node, dot, variables)
    if isinstance(items, str | int | Mapping) or not isinstance(items, Sequence):
        raise TemplateError(f"line {node.line}: {operand} is not a list")
    if not items:
        _render(node.otherwise, values, dot, variables, out)
    for index, item in enumerate(items):
        inner = dict(variables)
        if index_name:
            inner[index_name] = index
        if item_name:
            inner[item_name] = item
        _render(node.body, values, item, inner, out)


def _lookup(operand: str, node: _Node, dot: object, variables: Mapping[str, object]) -> object:
    if not _OPERAND.fullmatch(operand):
        raise TemplateError(f"line {node.line}: {operand[:40]} is not supported")
    base, _, name = operand.rpartition(".") if "." in operand else (operand, "", "")
    if base and base not in variables:
        raise TemplateError(f"line {node.line}: {base} is not defined here")
    value = variables[base] if base else dot
    if not name:
        return value
    if not isinstance(value, Mapping) or name not in value:
        raise TemplateError(f"line {node.line}: there is no .{name} here; known are PodCIDR, PodCIDRRanges, Routes")
    return value[name]
