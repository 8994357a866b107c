"""Ending: every plugin closes, the ones others rest on last."""

from __future__ import annotations

import logging

import pytest

from shim_core import daemon, plugins
from shim_core.config import Config, parse
from shim_core.hookspecs import hookimpl


class Above:
    def __init__(self, ended: list[str]) -> None:
        self.ended = ended

    @hookimpl
    def shim_shutdown(self) -> None:
        self.ended.append("above")
        raise OSError("secret detail")


class Below(Above):
    @hookimpl(trylast=True)
    def shim_shutdown(self) -> None:
        self.ended.append("below")


def test_a_plugin_that_fails_to_close_keeps_nobody_else_from_it(caplog: pytest.LogCaptureFixture) -> None:
    ended: list[str] = []
    manager = plugins.new_manager()
    manager.register(Below(ended), "a-below")
    manager.register(Above(ended), "b-above")
    config: Config = parse({}, [])
    with caplog.at_level(logging.ERROR, "shim"):
        daemon._shut_down(daemon.Assembly(config, manager, ()))
    assert ended == ["above", "below"]
    assert "the plugin b-above failed to shut down" in caplog.text
