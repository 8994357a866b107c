"""``make docs``: the pages of ``docs/`` that are rendered from code. A test holds them against it."""

from __future__ import annotations

import inspect
import json
import re
import sys
import textwrap
from pathlib import Path

import yaml

from shim_core import daemon, hookspecs, plugins
from shim_core.config import DEFAULT_PATH

DOCS = Path(__file__).parent.parent / "docs"


def hooks() -> str:
    """``docs/hooks.md``: every hook with its signature and its contract."""
    lines = [
        "# Hooks",
        "",
        "<!-- Rendered from shim_core/hookspecs by `make docs`. -->",
        "",
        *_paragraphs(hookspecs.__doc__ or ""),
        "How to write a plugin: [writing-a-plugin.md](writing-a-plugin.md).",
        "",
    ]
    for spec in plugins.SPECS:
        module = sys.modules[spec.__module__]
        lines += [f"## {spec.__module__.rsplit('.', 1)[-1].capitalize()}", "", *_paragraphs(module.__doc__ or "")]
        for name, function in vars(spec).items():
            if inspect.isfunction(function):
                lines += [f"### {name}", "", "```python", signature(name, function), "```", ""]
                lines += _paragraphs(function.__doc__ or "")
    return "\n".join(lines).rstrip() + "\n"


def signature(name: str, function: object) -> str:
    """One hook as it is declared, with how many may answer."""
    options = getattr(function, "shim_spec", {})
    kind = "first answer wins" if options.get("firstresult") else "all answers count"
    if options.get("historic"):
        kind = "all are told, late ones too"
    parameters = inspect.signature(function)  # type: ignore[arg-type]
    shown = [
        str(parameter).replace("'", "") for parameter in parameters.parameters.values() if parameter.name != "self"
    ]
    text = f"def {name}({', '.join(shown)}) -> {parameters.return_annotation}  # {kind}"
    if len(text) > 100:
        inner = "".join(f"    {parameter},\n" for parameter in shown)
        text = f"def {name}(\n{inner}) -> {parameters.return_annotation}  # {kind}"
    return text


def _paragraphs(docstring: str) -> list[str]:
    """A docstring as Markdown: fields as a list, examples as code."""
    out: list[str] = []
    example: list[str] | None = None
    for line in [*inspect.cleandoc(docstring).splitlines(), ""]:
        if example is not None:
            if not line or line.startswith(" "):
                example.append(line)
                continue
            out += _code(example)
            example = None
        if line.rstrip().endswith("::"):
            out += [_prose(line.rstrip()[:-2])] if line.strip() != "::" else []
            example = []
        else:
            out.append(_field(_prose(line)))
    if example is not None:
        out += _code(example)
    while out and not out[-1]:
        out.pop()
    return [*out, ""]


def _code(example: list[str]) -> list[str]:
    return ["```python", textwrap.dedent("\n".join(example)).strip("\n"), "```", ""]


def _prose(line: str) -> str:
    return re.sub(r":\w+:`~?([^`]*)`", r"`\1`", line).replace("``", "`")


def _field(line: str) -> str:
    for mark, words in ((":param ", "parameter"), (":returns:", "returns"), (":raises ", "raises")):
        if line.startswith(mark):
            rest = line.removeprefix(mark).strip()
            # Several on one line are written with three spaces between.
            parts = rest.split("   ")
            first = f"- *{words}* {parts[0].strip()}"
            return "\n".join([first, *(_field(part.strip()) for part in parts[1:])])
    return line


def configuration() -> str:
    """``docs/configuration.md``: every key of the first-party plugins."""
    lines = [
        "# Configuration",
        "",
        "<!-- Rendered from the plugins' settings by `make docs`. -->",
        "",
        f"YAML, read from `{DEFAULT_PATH}`, or from where `--config` says. Every key may be left out, and so may",
        "the file; a `portoshim.yaml` of the Go program works unchanged. A key that nobody knows is an error that",
        "names the nearest known one. Durations are written as in Go: `30s`, `5m`, `1m30s`.",
        "",
        "`portoshim config default` prints all keys with their defaults, those of other plugins that are installed",
        "included; `portoshim config dump` prints what is in force, secrets hidden.",
        "",
    ]
    tree = yaml.safe_load(daemon.default_config().dump())
    descriptions = daemon.default_config().descriptions()
    for section, keys in tree.items():
        lines += [f"## {section}", "", "| Key | Default | Meaning |", "|---|---|---|"]
        for key, value in keys.items():
            default = f"`{json.dumps(value, ensure_ascii=False)}`" if value not in ("", None, [], {}) else ""
            lines.append(f"| `{key}` | {default} | {' '.join(descriptions[section][key].split())} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


PAGES = {"hooks.md": hooks, "configuration.md": configuration}


def main() -> None:
    """Write the pages."""
    for name, render in PAGES.items():
        (DOCS / name).write_text(render())


if __name__ == "__main__":
    main()
