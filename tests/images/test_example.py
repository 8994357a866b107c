"""The example distribution and the pages about it: built, installed, discovered, and pulled through."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shim_core import config, errors
from shim_core.types import Shim
from tests.images.support import MakeNode, entry
from tools import images
from tools.images import File
from tools.registry import LocalRegistry

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "vault_registry"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built and installed into a directory of its own."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([*command, "--target", target, EXAMPLE], check=True, env=environment, timeout=120)
    return target


def run(installed: Path, *command: str) -> str:
    path = os.pathsep.join(filter(None, [str(installed), str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_found_once_it_is_installed(installed: Path, tmp_path: Path) -> None:
    path = tmp_path / "portoshim.yaml"
    path.write_text(
        f"Vault: {{Directory: {tmp_path}}}\nPortoshim: {{StateDir: {tmp_path}, LogsDir: {tmp_path}}}\n"
        "Plugins: {Disabled: [cni_net, embedded_porto, porto_runtime, streaming]}\n"
    )
    listed = run(installed, "-m", "shim_core.cli", "--config", str(path), "plugins")
    assert re.search(
        r"vault_registry  shim-vault-registry 0\.1\.0\n    registry_credentials\n    registry_endpoints\n", listed
    )
    dumped = run(installed, "-m", "shim_core.cli", "--config", str(path), "config", "dump")
    assert f"Vault:\n  Directory: {tmp_path}\n  Mirror: ''" in dumped


def test_its_own_tests_pass(installed: Path) -> None:
    assert " passed" in run(
        installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, str(EXAMPLE / "tests")
    )


def test_a_pull_with_a_token_of_the_vault(
    installed: Path,
    make_node: MakeNode,
    registries: Callable[..., LocalRegistry],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(installed)
    from shim_vault_registry.plugin import VaultRegistry, VaultSection

    registry = registries(auth="token")
    image = images.build([images.layer([File("a", b"a")])])
    images.push(image, registry, "vault/app")
    vault = tmp_path / "vault"
    vault.mkdir()
    plugin = VaultRegistry()
    plugin.shim_configure(Shim(config.parse({"Vault": {"Directory": str(vault)}}, [VaultSection]), None))
    node = make_node({"Registries": [entry(registry)]}, plugins={"vault_registry": plugin})
    name = f"{registry.address}/vault/app"
    with pytest.raises(errors.UnknownError, match="refuses"):
        node.pull(name)
    file = vault / registry.address.replace(":", "_")
    file.write_text("not a token")
    with pytest.raises(errors.UnknownError, match="refuses") as caught:
        node.pull(name)
    assert "not a token" not in caught.value.message
    assert registry.token_server is not None
    file.write_text(registry.token_server.answer("GET", "user", "repository:vault/app:pull")["token"])
    assert node.pull(name).id == image.id


def test_the_ten_lines_of_the_page_work(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "writing-a-plugin.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = blocks[0].replace("/run/vault/token", str(tmp_path / "token"))
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    (tmp_path / "token").write_text("t0ken\n")
    names: dict[str, object] = {}
    exec("from shim_core import testing\nfrom shim_core.types import ImageReference\n" + code, names)  # noqa: S102
    exec(blocks[-1], names)  # noqa: S102
    its_test = names["test_a_token_for_our_registry"]
    assert callable(its_test)
    its_test()


def test_the_command_of_the_page_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "writing-a-plugin.md").read_text()
    block = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "shim_command" in block)
    names: dict[str, Any] = {}
    vault = "class Vault:\n" + textwrap.indent(block, "    ")
    exec(f"from shim_core import hookimpl\nfrom shim_core.types import Command\n\n{vault}", names)  # noqa: S102
    plugin = names["Vault"]()
    plugin._directory = tmp_path
    (tmp_path / "registry.example.org").touch()
    command = plugin.shim_command()
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(["check"])) == 0
    assert capsys.readouterr().out == "registry.example.org\n"


def test_the_links_of_the_page_lead_somewhere() -> None:
    for page in (ROOT / "docs" / "writing-a-plugin.md", EXAMPLE / "README.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), target
