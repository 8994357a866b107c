"""What holds for the repository as a whole: versions, imports, documents that follow the code."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import shim_core
from shim_core import plugins, testing
from shim_core.daemon import default_config
from shim_core.dispatch import methods
from tools import docs

ROOT = Path(__file__).parents[2]
PLUGINS = sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))
PROJECTS = [ROOT, ROOT / "porto_api", *PLUGINS]


def metadata(project: Path) -> dict[str, Any]:
    with (project / "pyproject.toml").open("rb") as file:
        found: dict[str, Any] = tomllib.load(file)["project"]
    return found


def modules(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*.py") if not path.name.endswith("_pb2.py")]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_all_distributions_have_one_version() -> None:
    assert {metadata(project)["version"] for project in PROJECTS} == {shim_core.__version__}


@pytest.mark.parametrize("project", PLUGINS, ids=lambda path: path.name)
def test_one_word_for_one_thing(project: Path) -> None:
    data = metadata(project)
    name = project.name
    assert data["name"] == f"shim-{name.replace('_', '-')}"
    entry_points = data["entry-points"]["shim.plugins"]
    assert list(entry_points) == [name]
    assert entry_points[name].startswith(f"shim_{name}.plugin:")
    assert (project / "src" / f"shim_{name}" / "py.typed").exists()


@pytest.mark.parametrize("project", PROJECTS, ids=lambda path: path.name)
def test_dependencies_have_lower_bounds(project: Path) -> None:
    for requirement in metadata(project)["dependencies"]:
        assert ">=" in requirement


def test_the_core_knows_no_plugin_and_nothing_they_are_about() -> None:
    for path in modules(ROOT / "shim_core"):
        for name in imports(path):
            assert not re.match(r"(shim_(?!core)|porto_api|requests|tools|tests)", name), f"{path}: {name}"


def test_plugins_meet_only_in_hooks() -> None:
    for project in PLUGINS:
        own = f"shim_{project.name}"
        for path in modules(project / "src"):
            for name in imports(path):
                foreign = name.startswith("shim_") and name.split(".")[0] not in (own, "shim_core")
                assert not foreign, f"{path}: {name}"
                assert name.split(".")[0] not in ("grpc", "tools", "tests"), f"{path}: {name}"
                assert not name.startswith(("shim_core.server", "shim_core.dispatch", "shim_core.daemon")), (
                    f"{path}: {name}"
                )


def test_grpc_is_known_in_few_places() -> None:
    users = {path.name for path in modules(ROOT / "shim_core") if any(n.split(".")[0] == "grpc" for n in imports(path))}
    assert users == {"server.py", "testing.py"}


def test_porto_api_stands_alone() -> None:
    for path in modules(ROOT / "porto_api"):
        assert not any(name.startswith("shim_") for name in imports(path)), path


@pytest.mark.parametrize("page", docs.PAGES)
def test_rendered_pages_are_up_to_date(page: str) -> None:
    assert (docs.DOCS / page).read_text() == docs.PAGES[page](), "run `make docs`"


def test_the_coverage_page_has_every_call_and_says_who_answers() -> None:
    rows = dict(re.findall(r"^\| (\w+) \| (\w+) \|", (docs.DOCS / "cri-coverage.md").read_text(), re.MULTILINE))
    assert set(rows) - {"Call"} == {method.rpc for method in methods()}
    found = plugins.discover()
    manager = testing.manager()
    plugins.register(manager, found)
    answered = {plugin.name: set(plugins.hooks_of(manager, plugin)) for plugin in found}
    for method in methods():
        assert method.hook in answered[rows[method.rpc]], method.rpc


def test_links_between_documents_lead_somewhere() -> None:
    for page in [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("*/README.md"),
        *ROOT.glob("plugins/*/README.md"),
    ]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page}: {target}"


def test_generated_modules_are_those_of_the_proto_files(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    for source, root in (
        ("shim_core/cri/v1/api.proto", "."),
        ("porto_api/rpc.proto", "porto_api/src"),
        ("porto_api/seccomp.proto", "porto_api/src"),
    ):
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{root}", f"--python_out={tmp_path}", source]
        subprocess.run(command, cwd=ROOT, check=True)
        made = source.replace(".proto", "_pb2.py")
        assert (tmp_path / made).read_text() == (ROOT / root / made).read_text(), "run `make protos`"


def test_the_readme_begins_with_the_two_commands_and_names_only_targets_there_are() -> None:
    readme = (ROOT / "README.md").read_text()
    first_screen = "\n".join(readme.splitlines()[:24])
    assert "# make demo" in first_screen
    assert "# make test" in first_screen
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert set(re.findall(r"`make ([a-z]+)", page.read_text())) <= targets, page


def test_every_key_of_the_configuration_says_what_it_means() -> None:
    for section, keys in default_config().descriptions().items():
        for key, description in keys.items():
            assert description, f"{section}.{key}"


def test_the_systemd_unit_lets_the_stream_keeper_live() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[method-assign, assignment]
    unit.read(ROOT / "contrib" / "systemd" / "portoshim.service")
    assert (unit["Service"]["Type"], unit["Service"]["KillMode"]) == ("notify", "process")
