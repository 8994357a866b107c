"""The configuration file: YAML, one section per subject, each contributed and checked by the plugin it belongs to.

A plugin declares its keys as a :class:`Section`; several may add keys to the same section (``Images`` holds those of
the puller and those of registry authentication). Keys are PascalCase in the file, snake_case in Python.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, cast, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError
from pydantic.alias_generators import to_pascal

from shim_core.errors import ConfigError

DEFAULT_PATH = "/etc/portoshim.yaml"
MAX_FILE_BYTES = 1024 * 1024

S = TypeVar("S", bound="Section")


# -- what the values of keys may be ------------------------------------------------------------------------------------

_UNIT_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)")


def parse_duration(text: object) -> float:
    """Seconds of a duration written as in Go: ``300ms``, ``5m``, ``1m30s``, ``1.5h``.

    :raises ValueError: it is none; the text says what one looks like.
    """
    if isinstance(text, str):
        rest = text.strip()
        if rest == "0":
            return 0.0
        position, seconds = 0, 0.0
        for part in _DURATION_PART.finditer(rest):
            if part.start() != position:
                break
            position = part.end()
            seconds += float(part[1]) * _UNIT_SECONDS[part[2]]
        if rest and position == len(rest):
            return seconds
    hint = f" (did you mean {text}s?)" if isinstance(text, int | float) and not isinstance(text, bool) else ""
    raise ValueError(f"not a duration: write a number with its unit, such as 30s, 5m or 1m30s{hint}")


def format_duration(seconds: float) -> str:
    """The shortest of Go's forms: 300 → ``5m``, 90 → ``1m30s``, 0.25 → ``250ms``."""
    if seconds < 1:
        return f"{seconds * 1000:g}ms" if seconds else "0s"
    hours, rest = divmod(seconds, 3600)
    minutes, rest = divmod(rest, 60)
    parts = [f"{value:g}{unit}" for value, unit in ((hours, "h"), (minutes, "m"), (rest, "s")) if value]
    return "".join(parts)


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        raise ValueError("must be an absolute path")
    if "\0" in path:
        raise ValueError("must not contain a NUL byte")
    return path


Duration = Annotated[
    float, BeforeValidator(parse_duration), PlainSerializer(format_duration, return_type=str, when_used="json")
]
"""Seconds, written as Go writes durations."""

AbsolutePath = Annotated[str, AfterValidator(_absolute)]


class Section(BaseModel):
    """Keys of one section of the file. Subclass it; ``section`` is the section's name.

    Give every field a default and ``Field(description=...)``: ``config default`` prints both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_pascal, hide_input_in_errors=True)
    section: ClassVar[str] = ""


class PortoshimSection(Section):
    """``Portoshim``: the daemon itself."""

    section: ClassVar[str] = "Portoshim"

    config_path: AbsolutePath = Field(DEFAULT_PATH, description="This file. `--config` overrides it.")
    socket: AbsolutePath = Field("/run/portoshim.sock", description="Where kubelet and crictl connect.")
    logs_dir: AbsolutePath = Field("/var/log/portoshim", description="The log is portoshim.log in this directory.")
    volumes_dir: AbsolutePath = Field("/place/portoshim_volumes", description="Root volumes of containers.")
    state_dir: AbsolutePath = Field("/var/lib/portoshim", description="Records that outlive a restart.")


class PluginsSection(Section):
    """``Plugins``: which plugins are used, and who is asked first."""

    section: ClassVar[str] = "Plugins"

    disabled: tuple[str, ...] = Field((), description="Plugins that are installed and not to be loaded.")
    order: tuple[str, ...] = Field((), description="Plugins to be asked first, in this order.")


CORE_SECTIONS: tuple[type[Section], ...] = (PortoshimSection, PluginsSection)


# -- the file ----------------------------------------------------------------------------------------------------------


class Config:
    """The parsed configuration: one frozen object per :class:`Section`.

    ::

        config.get(CniSection).conf_dir
    """

    def __init__(self, sections: Iterable[Section], path: str | None = None) -> None:
        self.path = path
        """The file that was read; None when there was none."""
        self._sections = {type(section): section for section in sections}

    def get(self, section: type[S]) -> S:
        """The section object of that class.

        :raises KeyError: no loaded plugin contributed it.
        """
        return cast("S", self._sections[section])

    def dump(self) -> str:
        """The effective configuration as YAML, secrets hidden."""
        return yaml.safe_dump(self._tree(), sort_keys=False, allow_unicode=True)

    def describe(self) -> str:
        """The effective configuration as YAML, each key under its description."""
        lines: list[str] = []
        descriptions = self.descriptions()
        for name, keys in self._tree().items():
            lines.append(f"{name}:")
            for key, value in keys.items():
                lines += [f"  # {line}" for line in descriptions[name][key].splitlines()]
                text = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True).rstrip()
                lines += [f"  {line}" for line in text.splitlines()]
            lines.append("")
        return "\n".join(lines)

    def descriptions(self) -> dict[str, dict[str, str]]:
        """What each key means, by section and key as they are in the file."""
        found: dict[str, dict[str, str]] = {}
        for section in self._sections.values():
            for name, field in type(section).model_fields.items():
                found.setdefault(type(section).section, {})[_alias(type(section), name)] = field.description or ""
        return found

    def _tree(self) -> dict[str, dict[str, Any]]:
        tree: dict[str, dict[str, Any]] = {}
        for section in self._sections.values():
            tree.setdefault(type(section).section, {}).update(section.model_dump(mode="json", by_alias=True))
        return tree


def read_file(path: str, *, required: bool) -> dict[str, Any]:
    """The file as nested dictionaries, nothing checked but its form.

    :param required: a missing file is an error rather than an empty configuration.
    :raises ConfigError: it can't be read, or is no YAML mapping.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        if required:
            raise ConfigError(f"{path}: no such file; give --config the path of an existing file") from None
        return {}
    except OSError as err:
        raise ConfigError(f"{path}: can't be read: {err.strerror}") from err
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes: not a configuration file")
    try:
        tree = yaml.load(data, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path}: not valid YAML: {_yaml_problem(err)}") from err
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of sections, not a {type(tree).__name__}")
    return tree


def parse(
    tree: Mapping[str, Any],
    sections: Iterable[type[Section]],
    path: str | None = None,
    *,
    ignored: Iterable[str] = (),
) -> Config:
    """Check a configuration against the sections that plugins contributed.

    :param ignored: sections that may stand in the file though no loaded plugin knows them.
    :raises ConfigError: lists every mistake: file, key and fix, a line each.
    """
    models = list(sections)
    by_name: dict[str, list[type[Section]]] = {}
    for model in models:
        by_name.setdefault(model.section, []).append(model)
    where = path or "configuration"
    mistakes: list[str] = []

    for name, value in tree.items():
        if name not in by_name:
            if name not in ignored:
                mistakes.append(f"{where}: {name}: unknown section{_nearest(str(name), by_name)}")
        elif value is not None and not isinstance(value, dict):
            mistakes.append(f"{where}: {name}: must be a mapping of keys, not a {type(value).__name__}")
        elif value:
            known = [_alias(model, field) for model in by_name[name] for field in model.model_fields]
            for key in value:
                if key not in known:
                    mistakes.append(f"{where}: {name}.{key}: unknown key{_nearest(str(key), known)}")

    parsed: list[Section] = []
    for model in models:
        values = tree.get(model.section)
        own = {_alias(model, field) for field in model.model_fields}
        # A key without a value means its default, as in Go's YAML.
        subset = {k: v for k, v in values.items() if k in own and v is not None} if isinstance(values, dict) else {}
        try:
            parsed.append(model.model_validate(subset))
        except ValidationError as err:
            mistakes += [f"{where}: {line}" for line in _explain(model, err)]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return Config(parsed, path)


def check_collisions(contributed: Iterable[tuple[str, type[Section]]]) -> None:
    """Refuse two plugins that contribute the same key.

    :param contributed: pairs of a plugin's description and a section of its.
    :raises ConfigError: names key and plugins.
    """
    owners: dict[tuple[str, str], str] = {}
    for owner, model in contributed:
        if not model.section:
            raise ConfigError(f"{owner}: {model.__name__} names no section")
        for name in model.model_fields:
            key = (model.section, _alias(model, name))
            if key in owners:
                raise ConfigError(f"{owner} and {owners[key]} both define the configuration key {'.'.join(key)}")
            owners[key] = owner


class _Loader(yaml.SafeLoader):
    """YAML's safe subset, without duplicate keys: the second would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key} stands twice", problem_mark=key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def _yaml_problem(err: Exception) -> str:
    if isinstance(err, yaml.MarkedYAMLError) and err.problem_mark is not None:
        return f"line {err.problem_mark.line + 1}: {err.problem}"
    return "nested too deeply" if isinstance(err, RecursionError) else str(err).splitlines()[0]


def _alias(model: type[BaseModel], field: str) -> str:
    return model.model_fields[field].alias or field


def _nearest(word: str, known: Iterable[str]) -> str:
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {by_lower[close[0]]}?"
    return f"; known here: {', '.join(sorted(by_lower.values()))}" if by_lower else ""


def _explain(model: type[Section], err: ValidationError) -> Iterable[str]:
    for item in err.errors(include_url=False, include_input=False, include_context=False):
        key = model.section + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"])
        if item["type"] == "extra_forbidden":
            inner = _model_at(model, item["loc"][:-1])
            known = [_alias(inner, field) for field in inner.model_fields] if inner else []
            yield f"{key}: unknown key{_nearest(str(item['loc'][-1]), known)}"
        else:
            own = item["msg"].removeprefix("Value error, ")
            # pydantic's own messages are sentences; those of validators are written to follow the key.
            message = own if own != item["msg"] else own[:1].lower() + own[1:]
            yield f"{key}: {message}"


def _model_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The nested model that a location inside ``model`` belongs to."""
    current: type[BaseModel] | None = model
    for part in loc:
        if isinstance(part, int) or current is None:
            continue
        field = next((f for n, f in current.model_fields.items() if _alias(current, n) == part), None)
        current = _model_in(field.annotation) if field else None
    return current


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_in(arg))), None)
