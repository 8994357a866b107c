"""The OCI configuration crun builds a container's root from. Pure functions.

The process in it never runs: it waits, as of ``crun create``, until the container's own first process has taken over
its mount namespace. Who may do what, limits and cgroups are therefore not crun's business.
"""

from __future__ import annotations

from typing import Any

from shim_embedded_porto import limits
from shim_embedded_porto.container import Container
from shim_embedded_porto.settings.binds import Bind
from shim_embedded_porto.settings.devices import Device

MADE_BY_CRUN = frozenset(f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty"))
_READ_ONLY = ("/proc/sysrq-trigger", "/proc/irq", "/proc/bus", "/proc/sys")


def config(
    ct: Container,
    bundle: str,
    *,
    binds: list[Bind],
    files: list[str],
    joins_pid_namespace: bool,
    hugetlb: bool,
) -> dict[str, Any]:
    """The content of config.json.

    :param bundle: crun's work directory; ``rootfs``, ``run``, ``bind0``, ``files/0``, ``ns-net`` ... lie in it.
    :param binds: bind mounts, with absolute targets.
    :param files: paths that get a private file.
    """
    namespaces: list[dict[str, str]] = [{"type": "mount"}, {"type": "network", "path": f"{bundle}/ns-net"}]
    if joins_pid_namespace:
        namespaces.append({"type": "pid", "path": f"{bundle}/ns-pid"})
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["/proc/self/exe"],
            "env": [],
            "cwd": "/",
            "noNewPrivileges": True,
        },
        "root": {"path": f"{bundle}/rootfs", "readonly": False},
        "mounts": [
            *_system_mounts(bundle, hugetlb=hugetlb),
            *([_cgroup_mount()] if ct.cgroupfs != "none" else []),
            *(_bind_mount(bind, f"{bundle}/bind{index}") for index, bind in enumerate(binds)),
            *(_mount(path, "bind", f"{bundle}/files/{index}", "bind") for index, path in enumerate(files)),
        ],
        "linux": {
            "namespaces": namespaces,
            "devices": [device(dev) for dev in ct.effective_devices() if _needs_node(dev)],
            "maskedPaths": ["/proc/kcore"],
            "readonlyPaths": list(_READ_ONLY),
            "rootfsPropagation": "rslave",
        },
    }


def command(bundle: str, container_id: str) -> list[str]:
    """The command line that builds the root."""
    return [
        *("crun", f"--root={bundle}/state", "--cgroup-manager=disabled", f"--log={bundle}/log", "--log-format=json"),
        *("create", "--no-new-keyring", f"--bundle={bundle}", f"--pid-file={bundle}/pid", container_id),
    ]


def device(dev: Device) -> dict[str, Any]:
    return {
        "path": dev.path_inside,
        "type": dev.kind,
        "major": dev.major,
        "minor": dev.minor,
        "fileMode": dev.mode,
        "uid": dev.uid,
        "gid": dev.gid,
    }


def bind_options(bind: Bind) -> list[str]:
    """Mount options for a bind mount: no device files unless asked for, and nothing spreads back to the source."""
    recursive = "rec" in bind.flags
    options = ["rbind" if recursive else "bind", "ro" if bind.read_only else "rw"]
    options.append("dev" if "dev" in bind.flags else "nodev")
    options += [flag for flag in ("nosuid", "noexec", "noatime", "nodiratime", "relatime") if flag in bind.flags]
    spread = next((flag for flag in ("private", "unbindable") if flag in bind.flags), "slave")
    options.append(f"r{spread}" if recursive else spread)
    return options


def _needs_node(dev: Device) -> bool:
    return dev.makes_node and dev.path_inside not in MADE_BY_CRUN


def _bind_mount(bind: Bind, source: str) -> dict[str, Any]:
    return _mount(bind.target, "bind", source, *bind_options(bind))


def _cgroup_mount() -> dict[str, Any]:
    return _mount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid", "noexec", "nodev", "ro")


def _system_mounts(bundle: str, *, hugetlb: bool) -> list[dict[str, Any]]:
    quiet = ("nosuid", "noexec", "nodev")
    mounts = [
        _mount("/proc", "proc", "proc", *quiet),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", f"size={limits.DEV_BYTES}"),
        _mount(
            *("/dev/pts", "devpts", "devpts", "nosuid", "noexec"),
            *("newinstance", "ptmxmode=0666", "mode=620", "gid=5", "max=256"),
        ),
        _mount("/sys", "sysfs", "sysfs", *quiet, "ro"),
        _mount("/run", "bind", f"{bundle}/run", "rbind", "nosuid", "nodev"),
        _mount("/run/lock", "bind", f"{bundle}/run/lock", "bind", *quiet),
        _mount("/dev/shm", "bind", f"{bundle}/run/shm", "bind", "nosuid", "nodev", "strictatime"),
    ]
    if hugetlb:
        mounts.append(_mount("/dev/hugepages", "hugetlbfs", "hugetlbfs", "nosuid", "nodev", "mode=1777"))
    return mounts


def _mount(destination: str, kind: str, source: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": source, "options": list(options)}
