"""The parts that every call of this plugin works with, and where its files are."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shim_core.errors import StartupError
from shim_porto_runtime import linux
from shim_porto_runtime.names import is_id
from shim_porto_runtime.removal import remove_tree

if TYPE_CHECKING:
    from porto_api import Client
    from shim_core.cri.v1 import api_pb2 as pb
    from shim_porto_runtime.abilities import Abilities
    from shim_porto_runtime.cdi import Registry
    from shim_porto_runtime.cri_events import EventHub
    from shim_porto_runtime.events import Monitor
    from shim_porto_runtime.images import ImageService
    from shim_porto_runtime.keeper import KeeperClient
    from shim_porto_runtime.leftovers import Leftovers
    from shim_porto_runtime.locks import NamedLocks
    from shim_porto_runtime.names import Names
    from shim_porto_runtime.records import Records
    from shim_porto_runtime.samples import Sampler
    from shim_porto_runtime.starts import Starts
    from shim_porto_runtime.usage import UsageSampler

logger = logging.getLogger("shim.porto_runtime.directories")


@dataclass(frozen=True, slots=True)
class Directories:
    """Where things are on the host.

    ::

        StateDir/records.db, images.db, shim-id
        StateDir/init-<hash>                  portoshim-init, one copy per version
        StateDir/containers/<id>/             what a container sees as /.portoshim: init, FIFOs, namespaces to join
        StateDir/sandboxes/<id>/              what the containers of a pod share (see namespaces.py)
        VolumesDir/<id>                       root volumes
        VolumesDir/<id>-volumes/              volumes that the image names
    """

    state: Path
    volumes: Path

    def prepare(self) -> None:
        """Make them, closed to everybody but root.

        :raises StartupError: one can't be made.
        """
        try:
            open_to_containers = (self.containers, self.sandboxes, self.volumes)
            for path, mode in ((self.state, 0o700), *((path, 0o711) for path in open_to_containers)):
                path.mkdir(parents=True, exist_ok=True)
                path.chmod(mode)
        except OSError as err:
            raise StartupError(f"{err.filename}: {err.strerror}; set Portoshim.StateDir and VolumesDir") from err

    @property
    def containers(self) -> Path:
        return self.state / "containers"

    @property
    def sandboxes(self) -> Path:
        return self.state / "sandboxes"

    @property
    def records(self) -> Path:
        return self.state / "records.db"

    def root(self, owner_id: str) -> Path:
        """The mount point of the root volume of a container, or of a sandbox's pause."""
        return self.volumes / owner_id

    def helper(self, container_id: str) -> Path:
        return self.containers / container_id

    def sandbox(self, sandbox_id: str) -> Path:
        """What the containers of a pod share."""
        return self.sandboxes / sandbox_id

    def owned_volumes(self, container_id: str) -> Path:
        """What a container's own volumes hold, and where images are mounted for it."""
        return self.volumes / f"{container_id}-volumes"

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

    def make_helper(self, container_id: str, init: Path, namespaces: Mapping[str, str]) -> Path:
        """The helper directory of a container, with init in it.

        :param namespaces: what else to put there: name → file of a namespace.
        """
        directory = self.helper(container_id)
        directory.mkdir(mode=0o711, exist_ok=True)
        target = directory / "init"
        if not target.exists():
            os.link(init, target)
        for name, source in namespaces.items():
            file = directory / name
            file.touch()
            linux.mount(source, str(file), "none", linux.MS_BIND)
        return directory

    def owners(self) -> set[str]:
        """The ids of all containers and sandboxes that have anything on disk."""
        # Not those of VolumesDir: it may be another shim's as well.
        found = {path.name for above in (self.containers, self.sandboxes) for path in above.iterdir()}
        return {name for name in found if is_id(name)}

    def remove_files(self, owner_id: str) -> bool:
        """Remove what a container or a sandbox has on disk. Its Porto container has to be gone.

        What is mounted there by others is left alone, and looked for again at the next start.

        :returns: False when something is left.
        """
        left = list(remove_tree(self.owned_volumes(owner_id)))
        try:
            # A volume's mount point stays when Porto takes the volume away. There is nothing in it.
            self.root(owner_id).rmdir()
        except FileNotFoundError:
            pass
        except OSError as err:
            left.append(f"{self.root(owner_id)}: {err.strerror}")
        if not left:
            # Last: by this directory the rest is found again.
            helper = self.helper(owner_id)
            for name in NAMESPACE_FILES:
                linux.unmount(str(helper / name))
            left += remove_tree(helper)
        for what in left:
            logger.warning("%s; it is left as it is", what)
        return not left


NAMESPACE_FILES = ("ipc", "uts", "pid")


@dataclass(frozen=True, slots=True)
class Runtime:
    """Everything a call needs; made once at start-up."""

    porto: Client
    abilities: Abilities
    cdi: Registry
    records: Records
    images: ImageService
    keeper: KeeperClient
    monitor: Monitor
    events: EventHub
    sampler: Sampler
    usage: UsageSampler
    hooks: Any
    locks: NamedLocks
    starts: Starts
    leftovers: Leftovers
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
