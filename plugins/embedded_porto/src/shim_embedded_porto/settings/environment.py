"""A container's environment: variables that are set, unset, locked by Porto, or secret."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from shim_embedded_porto import text
from shim_embedded_porto.errors import invalid_value


@dataclass(slots=True)
class Variable:
    name: str
    value: str
    set: bool = True
    locked: bool = False
    overwritten: bool = True
    secret: bool = False


def digest(value: str) -> tuple[str, str]:
    """Salt and MD5 of a secret: what Porto shows in its place."""
    salt = secrets.token_hex(4)
    return salt, hashlib.md5((salt + value).encode(), usedforsecurity=False).hexdigest()


class Environment:
    """Variables in the order they were named first."""

    def __init__(self) -> None:
        self._variables: dict[str, Variable] = {}

    def __iter__(self) -> Iterator[Variable]:
        return iter(self._variables.values())

    @classmethod
    def parse(cls, config: str, *, secret: bool = False) -> Environment:
        """``NAME=value; UNSET; ...``."""
        environment = cls()
        environment.merge(config, secret=secret)
        return environment

    def merge(self, config: str, *, overwrite: bool = True, secret: bool = False) -> None:
        """Add what ``config`` says; without ``overwrite`` a variable that is there already stays as it is."""
        for entry in text.split(config, ";"):
            name, separator, value = entry.partition("=")
            if separator:
                self.set(name, value, overwrite=overwrite, secret=secret)
            else:
                self.unset(name, overwrite=overwrite)

    def set(self, name: str, value: str, *, overwrite: bool = True, locked: bool = False, secret: bool = False) -> None:
        known = self._variables.get(name)
        if known is None or (overwrite and not (known.locked and known.value != value)):
            self._variables[name] = Variable(name, value, True, locked, overwrite, secret)

    def unset(self, name: str, *, overwrite: bool = True) -> None:
        known = self._variables.get(name)
        if known is None:
            self._variables[name] = Variable(name, "", set=False, overwritten=overwrite)
        elif overwrite and not (known.locked and known.set):
            known.value, known.set, known.overwritten, known.secret = "", False, overwrite, False
        # Without overwrite an unset variable stays unset and a set one stays set.

    def get(self, name: str) -> str:
        """The value as a client may see it.

        :raises Fault: InvalidValue: not set.
        """
        variable = self._variables.get(name)
        if variable is None or not variable.set:
            raise invalid_value(f"Environment variable {name} not defined")
        return _hidden(variable) if variable.secret else variable.value

    def format(self, *, show_secrets: bool = False) -> str:
        entries = []
        for variable in self:
            if not variable.set:
                entries.append(variable.name)
            elif variable.secret and not show_secrets:
                entries.append(f"{variable.name}={_hidden(variable)}")
            else:
                entries.append(f"{variable.name}={variable.value}")
        return text.merge(entries, ";")

    def values(self) -> dict[str, str]:
        """What a process gets."""
        return {variable.name: variable.value for variable in self if variable.set and variable.name}


def _hidden(variable: Variable) -> str:
    salt, md5 = digest(variable.value)
    return f"<secret salt={salt} md5={md5}>"
