"""Installed with pip into environments of their own, as an operator would, and as somebody with a plugin would."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from shim_core.cri.v1 import api_pb2 as pb
from tests.e2e.pods import Pods, failure
from tools import images
from tools.node import PAUSE, Node
from tools.registry import LocalRegistry

ROOT = Path(__file__).parents[2]
WHEELS = Path(sys.prefix) / "wheels"
ALL = [".", "./porto_api", *(f"./{path.relative_to(ROOT)}" for path in sorted((ROOT / "plugins").iterdir()))]

pytestmark = pytest.mark.skipif(not WHEELS.is_dir(), reason="`make prepare` has not fetched the wheels")


@pytest.fixture
def environment(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A fresh virtual environment; runs its programs: ``environment("pip", "install", ...)``."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON", "VIRTUAL_ENV"))}
    variables |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(WHEELS), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def run(program: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [str(tmp_path / "venv" / "bin" / program), *arguments]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return run


def test_everything_in_one_command(environment: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    environment("pip", "install", "--quiet", *ALL)
    listed = environment("portoshim", "plugins").stdout
    for name in ("porto_runtime", "cni_net", "registry_auth", "streaming", "embedded_porto"):
        assert f"{name}  shim-" in listed
    environment("python", "-c", "from porto_api import Client")


def test_the_core_and_then_one_plugin(environment: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    environment("pip", "install", "--quiet", ".")
    assert environment("portoshim", "plugins").stdout == ""
    environment("pip", "install", "--quiet", "./plugins/registry_auth")
    assert environment("portoshim", "plugins").stdout.startswith("registry_auth  shim-registry-auth")


def third_distribution(directory: Path, registry: LocalRegistry) -> Path:
    """Somebody's plugin: credentials for one registry, and nothing else."""
    assert registry.credentials is not None
    user, password = registry.credentials
    (directory / "acme_vault.py").write_text(
        textwrap.dedent(
            f"""
            from shim_core import hookimpl
            from shim_core.types import RegistryCredentials

            class Vault:
                @hookimpl
                def registry_credentials(self, image, auth, context):
                    if image.registry == {registry.address!r}:
                        return RegistryCredentials(username={user!r}, password={password!r})
            """
        )
    )
    (directory / "pyproject.toml").write_text(
        textwrap.dedent(
            """
            [build-system]
            requires = ["hatchling"]
            build-backend = "hatchling.build"
            [project]
            name = "acme-vault"
            version = "2.0"
            dependencies = ["shim-core"]
            [project.entry-points."shim.plugins"]
            acme_vault = "acme_vault:Vault"
            [tool.hatch.build.targets.wheel]
            only-include = ["acme_vault.py"]
            """
        )
    )
    return directory


@pytest.mark.root
def test_a_third_distribution_is_asked_in_a_real_pull(
    environment: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    environment("pip", "install", "--quiet", *ALL)
    with LocalRegistry(tmp_path / "registry", auth="token", public=["pause"]) as registry:
        repository, _, tag = PAUSE.partition(":")
        images.push(images.pause(), registry, repository, [tag])
        images.push(images.busybox(), registry, "private/busybox", ["1"])
        name = f"{registry.address}/private/busybox:1"
        wanted = pb.PullImageRequest(image=pb.ImageSpec(image=name))
        python = str(tmp_path / "venv" / "bin" / "python")
        with Node(tmp_path / "node", registry=registry, python=python) as node:
            assert failure(node.cri.PullImage, wanted)[0] == "UNKNOWN"
        vault = tmp_path / "vault"
        vault.mkdir()
        environment("pip", "install", "--quiet", str(third_distribution(vault, registry)))
        assert "acme_vault  acme-vault 2.0\n    registry_credentials\n" in environment("portoshim", "plugins").stdout
        with Node(tmp_path / "node", registry=registry, python=python) as node:
            node.cri.PullImage(wanted)
            pods = Pods(node, name)
            sandbox = pods.run()
            assert pods.output(sandbox, "echo", "pulled") == "pulled\n"
            pods.remove_all()
