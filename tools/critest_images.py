"""The images of critest, made on the spot: what each one has to have inside is read off the suite's specs.

The suite pulls by real names from :data:`HOSTS`, so :func:`push` wants a registry that answers for those. The
programs are small and static, from ``tools/programs``: the commands that specs run, and servers that look like nginx
and httpd where specs look at them (processes, pid file, logs).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools import images
from tools.images import File, Image, Layer
from tools.registry import LocalRegistry

HOSTS = ("registry.k8s.io", "k8s.gcr.io", "gcr.io")
PAUSE = "registry.k8s.io/pause:3.9"

_E2E = "registry.k8s.io/e2e-test-images"
_STAGING = "gcr.io/k8s-staging-cri-tools"
_PROGRAMS = Path(__file__).parent / "programs"
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# As in busybox's image: specs name nobody and www-data.
_USERS = {"root": 0, "daemon": 1, "bin": 2, "sys": 3, "www-data": 33, "nobody": 65534}
_GROUPS = {**_USERS, "users": 100}


class ImagesError(Exception):
    """An image can't be made here."""


@functools.cache
def program(name: str) -> bytes:
    """A program of ``tools/programs``, compiled.

    :raises ImagesError: there is no compiler.
    """
    made = images.compile_c((_PROGRAMS / f"{name}.c").read_text())
    if made is None:
        raise ImagesError("critest's images need a C compiler: apt-get install gcc libc6-dev")
    return made


def all_images() -> dict[str, Image]:
    """Every image by its full reference.

    One is missing: the suite pulls ``test-image-digest`` by the digest of what its authors pushed, which nothing that
    is built here can have.
    """
    base = _base()
    tags = _marked(base, "tags")
    pause = images.pause()
    architecture = images.machine_architecture()
    return {
        PAUSE: pause,
        "k8s.gcr.io/pause:3.9": pause,
        f"{_E2E}/busybox:1.29-2": _image([base]),
        f"{_E2E}/nginx:1.14-2": _nginx(base),
        f"{_E2E}/httpd:2.4.39-4": _httpd(base),
        f"{_E2E}/nonewprivs:1.3": _image(
            [base, images.layer([File("nnp", program("nonewprivs"), 0o4755)])], {"Entrypoint": ["/nnp"], "Cmd": None}
        ),
        f"{_STAGING}/hostnet-nginx-{architecture}:latest": _nginx(base, port=12003),
        f"{_STAGING}/test-image-latest:latest": _marked(base, "latest"),
        f"{_STAGING}/test-image-tag:test": _marked(base, "tag"),
        f"{_STAGING}/test-image-tag:all": _marked(base, "all"),
        **{f"{_STAGING}/test-image-{number}:latest": _marked(base, str(number)) for number in (1, 2, 3)},
        **{f"{_STAGING}/test-image-tags:{number}": tags for number in (1, 2, 3)},
        f"{_STAGING}/test-image-user-uid:latest": _image([base], {"User": "1002"}),
        f"{_STAGING}/test-image-user-username:latest": _image([base], {"User": "www-data"}),
        f"{_STAGING}/test-image-user-uid-group:latest": _image([base], {"User": "1003:users"}),
        f"{_STAGING}/test-image-user-username-group:latest": _image([base], {"User": "www-data:100"}),
        f"{_STAGING}/test-image-predefined-group:latest": _predefined_group(base),
    }


def push(registry: LocalRegistry) -> None:
    """Fill a registry that answers for :data:`HOSTS`."""
    for reference, image in all_images().items():
        path, _, tag = reference.partition("/")[2].rpartition(":")
        images.push(image, registry, path, [tag])


# -- the images --------------------------------------------------------------------------------------------------------


@functools.cache
def _base() -> Layer:
    """busybox, and the commands that Debian's lacks.

    The names are hard links: a spec masks ``/bin/ls`` alone. ``/bin/sh`` is a program of its own, since the shell in
    Debian's busybox would run the masked ``ls`` all the same.
    """
    own = {f"bin/{name}": File(f"bin/{name}", program(name), 0o755) for name in ("sh", "pgrep", "ipcs")}
    accounts = {file.path: file for file in _accounts(_USERS, _GROUPS)}
    files = [file for file in images.busybox_files(hard_links=True) if file.path not in own | accounts]
    return images.layer([*files, *own.values(), *accounts.values(), File("var/run", link="../run")])


def _image(layers: Sequence[Layer], config: Mapping[str, Any] | None = None) -> Image:
    return images.build(layers, {"Cmd": ["sh"], "Env": [_PATH], **(config or {})}, docker=True)


def _marked(base: Layer, mark: str) -> Image:
    """An image that differs from the others."""
    return _image([base, images.layer([File(mark, f"{mark}\n".encode())])])


def _nginx(base: Layer, port: int = 80) -> Image:
    """A web server with nginx's processes, pid file and logs; the newer image starts it by way of a script."""
    server = images.layer(
        [
            File("usr/sbin"),
            File("usr/sbin/nginx", program("webserver"), 0o755),
            File("etc/nginx"),
            File("etc/nginx/conf.d"),
            File("etc/nginx/conf.d/default.conf", f"server {{\n    listen       {port};\n}}\n".encode()),
            File("var/log/nginx"),
            File("var/log/nginx/access.log", link="/dev/stdout"),
            File("var/log/nginx/error.log", link="/dev/stderr"),
            File("docker-entrypoint.sh", b'#!/bin/sh\nset -e\nexec "$@"\n', 0o755),
            *_accounts({**_USERS, "nginx": 101}, {**_GROUPS, "nginx": 101}),
        ]
    )
    config: dict[str, Any] = {"Cmd": ["nginx", "-g", "daemon off;"], "ExposedPorts": {f"{port}/tcp": {}}}
    if port != 80:
        config |= {"Entrypoint": ["/docker-entrypoint.sh"], "StopSignal": "SIGQUIT"}
    return _image([base, server], config)


def _httpd(base: Layer) -> Image:
    """A web server with httpd's processes, pid file and logs."""
    home = "usr/local/apache2"
    server = images.layer(
        [
            File("usr/local"),
            File("usr/local/bin"),
            File(home),
            File(f"{home}/bin"),
            File(f"{home}/logs"),
            File(f"{home}/bin/httpd", program("webserver"), 0o755),
            # By its path: the shell in Debian's busybox has an httpd of its own.
            File(
                "usr/local/bin/httpd-foreground",
                f'#!/bin/sh\nexec /{home}/bin/httpd -DFOREGROUND "$@"\n'.encode(),
                0o755,
            ),
        ]
    )
    config = {
        "Cmd": ["httpd-foreground"],
        "Env": [f"{_PATH}:/{home}/bin"],
        "WorkingDir": f"/{home}",
        "ExposedPorts": {"80/tcp": {}},
        "StopSignal": "SIGWINCH",
    }
    return _image([base, server], config)


def _predefined_group(base: Layer) -> Image:
    users = {**_USERS, "default-user": 1000}
    files = _accounts(users, {**_GROUPS, "default-user": 1000}, "group-defined-in-image:x:50000:default-user")
    return _image([base, images.layer(files)], {"User": "1000"})


def _accounts(users: Mapping[str, int], groups: Mapping[str, int], *more_groups: str) -> list[File]:
    """``/etc/passwd`` and ``/etc/group``; each user has the group of the same number."""
    passwd = [f"{name}:x:{number}:{number}:{name}:/:/bin/sh" for name, number in users.items()]
    group = [*(f"{name}:x:{number}:" for name, number in groups.items()), *more_groups]
    return [
        File("etc/passwd", "\n".join([*passwd, ""]).encode()),
        File("etc/group", "\n".join([*group, ""]).encode()),
    ]
