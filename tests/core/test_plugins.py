"""Loading plugins: order, and how a broken one is named."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from shim_core import hookimpl, plugins, testing
from shim_core.cri.v1 import api_pb2
from shim_core.dispatch import methods
from shim_core.errors import PluginError


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on sys.path to put distributions into; nothing but them is seen as a plugin."""
    monkeypatch.syspath_prepend(str(tmp_path))
    # stevedore remembers a namespace for the life of the process.
    monkeypatch.setattr(plugins, "NAMESPACE", f"shim.{tmp_path.name}")
    return tmp_path


def install(site: Path, name: str, body: str, entry: str | None = None) -> None:
    module = f"{name}_of_{re.sub('[^a-z0-9]', '_', site.name)}"
    (site / f"{module}.py").write_text(f"from shim_core import hookimpl\n{body}")
    info = site / f"fake_{name}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fake-{name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[{plugins.NAMESPACE}]\n{entry or name} = {module}:Plugin\n")


GOOD = "class Plugin:\n    @hookimpl\n    def cri_version(self, request, context):\n        return {answer!r}\n"


def load(**settings: list[str]) -> tuple[list[plugins.Plugin], object]:
    found = plugins.discover(**settings)
    manager = plugins.new_manager()
    plugins.register(manager, found)
    return found, manager.hook.cri_version(request=None, context=None)


def test_the_first_in_order_is_asked_first(site: Path) -> None:
    for name in ("alpha", "beta", "gamma"):
        install(site, name, GOOD.format(answer=name))
    assert load()[1] == "alpha"
    assert load(order=["gamma", "beta"])[1] == "gamma"
    assert [p.name for p in load(order=["gamma"])[0]] == ["gamma", "alpha", "beta"]
    assert load(disabled=["alpha"])[1] == "beta"


def test_a_plugin_knows_its_distribution(site: Path) -> None:
    install(site, "alpha", GOOD.format(answer=1))
    assert str(load()[0][0]) == "plugin alpha (fake-alpha 1.2)"


def test_a_disabled_plugin_is_not_even_imported(site: Path) -> None:
    install(site, "broken", "raise RuntimeError('boom')")
    assert load(disabled=["broken"])[0] == []


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("raise RuntimeError('boom')", "plugin bad of fake-bad 1.2 can't be loaded from bad_of_.*:Plugin: .*boom"),
        ("import nowhere_to_be_found", "plugin bad of fake-bad 1.2 can't be loaded .*nowhere_to_be_found"),
        ("Pluggin = 1", "plugin bad of fake-bad 1.2 can't be loaded"),
        ("class Plugin:\n    def __init__(self, x): pass", "plugin bad of fake-bad 1.2 can't be created"),
        (
            "class Plugin:\n    @hookimpl\n    def cri_versoin(self): pass",
            r"plugin bad \(fake-bad 1.2\): unknown hook 'cri_versoin'.*; did you mean cri_version\?",
        ),
        (
            "class Plugin:\n    @hookimpl\n    def cri_version(self, reqest): pass",
            r"plugin bad \(fake-bad 1.2\): .*reqest",
        ),
        (
            "class Plugin:\n    def cri_version(self, request): pass",
            r"plugin bad \(fake-bad 1.2\): cri_version must be marked with @hookimpl",
        ),
    ],
)
def test_a_broken_plugin_stops_the_start_by_name(site: Path, body: str, expected: str) -> None:
    install(site, "bad", body)
    with pytest.raises(PluginError) as caught:
        load()
    assert re.search(expected, str(caught.value)), str(caught.value)


def test_two_plugins_of_one_name_are_refused(site: Path) -> None:
    install(site, "alpha", GOOD.format(answer=1))
    install(site, "beta", GOOD.format(answer=2), entry="alpha")
    with pytest.raises(PluginError, match="two plugins are called alpha, from fake-alpha and fake-beta"):
        load()


def test_an_unknown_name_in_the_settings_is_pointed_out(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    install(site, "alpha", GOOD.format(answer=1))
    with caplog.at_level("WARNING", "shim"):
        load(disabled=["alpa"])
    assert "Plugins.Disabled: no plugin alpa is installed; did you mean alpha?" in caplog.text


def test_there_is_a_hook_for_every_call_and_a_call_for_every_cri_hook() -> None:
    calls = {method.hook for method in methods()}
    assert len(calls) == 43
    assert {name for name in plugins.hook_names() if name.startswith("cri_")} == calls


def test_hooks_are_typed_with_the_messages_of_their_call() -> None:
    specs = {n: f for spec in plugins.SPECS for n, f in inspect.getmembers(spec, inspect.isfunction)}
    for method in methods():
        signature = inspect.signature(specs[method.hook])
        answer = f"pb.{method.response.DESCRIPTOR.name}"
        assert list(signature.parameters) == ["self", "request", "context"], method.hook
        assert signature.parameters["request"].annotation == f"pb.{method.request.DESCRIPTOR.name}"
        assert signature.return_annotation == (f"Iterator[{answer}] | None" if method.streaming else f"{answer} | None")


def test_every_hook_says_what_it_means() -> None:
    for spec in plugins.SPECS:
        for name, function in inspect.getmembers(spec, inspect.isfunction):
            assert function.__doc__, name


def test_the_first_answer_wins_and_empty_is_an_answer() -> None:
    class First:
        @hookimpl
        def cri_stop_pod_sandbox(self) -> api_pb2.StopPodSandboxResponse:
            return api_pb2.StopPodSandboxResponse()

    class Second:
        @hookimpl
        def cri_stop_pod_sandbox(self) -> None:
            raise AssertionError("must not be asked")

    made = testing.manager(first=First(), second=Second())
    answer = made.hook.cri_stop_pod_sandbox(request=None, context=None)
    assert isinstance(answer, api_pb2.StopPodSandboxResponse)
