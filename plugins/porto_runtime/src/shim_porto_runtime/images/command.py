"""``portoshim images``: images to and from files, for machines that no registry can be reached from."""

from __future__ import annotations

import secrets
import signal
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from porto_api import Client
from shim_core.config import PortoshimSection
from shim_core.context import CallContext
from shim_core.types import Command, Shim
from shim_porto_runtime.images import reference
from shim_porto_runtime.images.model import Image
from shim_porto_runtime.images.service import ImageService
from shim_porto_runtime.images.settings import ImageSettings
from shim_porto_runtime.settings import PortoSection


def make(shim: Shim) -> Command:
    """The command, for the store that the configuration names. It may run beside the daemon."""

    def run(arguments: Namespace) -> int:
        with _until_interrupted(f"portoshim images {arguments.images}") as context, _service(shim) as service:
            if arguments.images == "load":
                for image in service.load(arguments.file, context):
                    print(f"{image.id}  {' '.join(_names(image))}".rstrip())
            elif arguments.images == "save":
                service.save(arguments.names, arguments.file, context, docker=arguments.docker)
            else:
                _list(service)
        return 0

    return Command("images", "list images; bring them from a file, write them to one", _add_arguments, run)


def _add_arguments(parser: ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="images", metavar="command", required=True)
    load = commands.add_parser("load", help="bring in all images of an OCI archive or a docker-archive")
    load.add_argument("file", type=Path, metavar="FILE", help="the archive, packed or not")
    save = commands.add_parser("save", help="write images to an OCI archive")
    save.add_argument("--docker", action="store_true", help="write a docker-archive, which `docker load` reads")
    save.add_argument("file", type=Path, metavar="FILE", help="written anew")
    save.add_argument("names", nargs="+", metavar="NAME", help="an image by name or id")
    commands.add_parser("list", help="list the images there are")


@contextmanager
def _service(shim: Shim) -> Iterator[ImageService]:
    """The image service on the daemon's own store."""
    porto_settings = shim.config.get(PortoSection)
    porto = Client(shim.hooks.runtime_endpoint() or porto_settings.socket, porto_settings.socket_timeout)
    service = ImageService(
        porto,
        shim.hooks,
        shim.config.get(ImageSettings),
        # Which layers are in use, the daemon knows; and Porto removes none of those.
        tuple,
        state_dir=Path(shim.config.get(PortoshimSection).state_dir),
        images_dir=porto_settings.images_dir,
    )
    try:
        service.start()
        try:
            yield service
        finally:
            service.close()
    finally:
        porto.close()


@contextmanager
def _until_interrupted(what: str) -> Iterator[CallContext]:
    """A context that Ctrl-C and SIGTERM cancel: what was begun is cleaned up."""
    context = CallContext(what, secrets.token_hex(4))
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: context.cancel()) for number in numbers]
    try:
        yield context
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _list(service: ImageService) -> None:
    rows = [("IMAGE", "ID", "SIZE", "PINNED")]
    for image in service.images():
        short = image.id.removeprefix("sha256:")[:13]
        for name in _names(image) or ["<none>"]:
            rows.append((name, short, _size(image.size_bytes), "yes" if image.pinned else ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _names(image: Image) -> list[str]:
    """Tags; digests where there are none."""
    return [reference.familiar(reference.parse(name)) for name in image.repo_tags or image.repo_digests]


def _size(size_bytes: int) -> str:
    size = size_bytes / 1024
    for unit in ("KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
