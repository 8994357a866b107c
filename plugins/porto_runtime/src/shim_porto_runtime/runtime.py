"""The parts that every call of this plugin works with, and where its files are."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shim_core.errors import StartupError

if TYPE_CHECKING:
    from porto_api import Client
    from shim_core.cri.v1 import api_pb2 as pb
    from shim_porto_runtime.events import Monitor
    from shim_porto_runtime.images import ImageService
    from shim_porto_runtime.keeper import KeeperClient
    from shim_porto_runtime.locks import NamedLocks
    from shim_porto_runtime.names import Names
    from shim_porto_runtime.records import Records


@dataclass(frozen=True, slots=True)
class Directories:
    """Where things are on the host.

    ::

        StateDir/records.db, images.db, shim-id
        StateDir/init-<hash>                  portoshim-init, one copy per version
        StateDir/containers/<id>/             what a container sees as /.portoshim: init, FIFOs
        VolumesDir/<id>                       root volumes
    """

    state: Path
    volumes: Path

    def prepare(self) -> None:
        """Make them, closed to everybody but root.

        :raises StartupError: one can't be made.
        """
        try:
            for path, mode in ((self.state, 0o700), (self.containers, 0o711), (self.volumes, 0o711)):
                path.mkdir(parents=True, exist_ok=True)
                path.chmod(mode)
        except OSError as err:
            raise StartupError(f"{err.filename}: {err.strerror}; set Portoshim.StateDir and VolumesDir") from err

    @property
    def containers(self) -> Path:
        return self.state / "containers"

    @property
    def records(self) -> Path:
        return self.state / "records.db"

    def root(self, owner_id: str) -> Path:
        """The mount point of the root volume of a container, or of a sandbox's pause."""
        return self.volumes / owner_id

    def helper(self, container_id: str) -> Path:
        return self.containers / container_id

    def shim_id(self) -> str:
        """What tells this shim's containers from those of another one on the same portod. Made once."""
        path = self.state / "shim-id"
        try:
            return path.read_text().strip()
        except FileNotFoundError:
            made = secrets.token_hex(8)
            partial = path.with_suffix(".new")
            partial.write_text(made)
            partial.replace(path)
            return made

    def install_init(self) -> Path:
        """Put portoshim-init on the filesystem that the helper directories are on; its path."""
        with resources.as_file(resources.files("shim_porto_runtime") / "init" / "portoshim-init") as source:
            try:
                digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
            except FileNotFoundError as err:
                raise StartupError("portoshim-init is not installed; install shim-porto-runtime again") from err
            target = self.state / f"init-{digest}"
            if not target.exists():
                partial = target.with_suffix(".new")
                shutil.copyfile(source, partial)
                partial.chmod(0o755)
                partial.replace(target)
        return target

    def make_helper(self, container_id: str, init: Path) -> Path:
        """The helper directory of a container, with init in it."""
        directory = self.helper(container_id)
        directory.mkdir(mode=0o711, exist_ok=True)
        target = directory / "init"
        if not target.exists():
            os.link(init, target)
        return directory

    def remove_files(self, owner_id: str) -> None:
        """Remove helper directory and mount point. The volume has to be gone: what is still mounted stays."""
        shutil.rmtree(self.helper(owner_id), ignore_errors=True)
        try:
            self.root(owner_id).rmdir()
        except FileNotFoundError:
            pass


@dataclass(frozen=True, slots=True)
class Runtime:
    """Everything a call needs; made once at start-up."""

    porto: Client
    records: Records
    images: ImageService
    keeper: KeeperClient
    monitor: Monitor
    hooks: Any
    locks: NamedLocks
    names: Names
    directories: Directories
    init: Path
    shim_id: str
    runtime_name: str
    pause_image: str
    """Empty: no pause process."""
    place: str

    def hostname_of(self, config: pb.PodSandboxConfig) -> str:
        """The hostname a pod's processes see."""
        return config.hostname or os.uname().nodename
