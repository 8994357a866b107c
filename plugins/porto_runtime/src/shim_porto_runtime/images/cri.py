"""Images in the CRI's messages."""

from __future__ import annotations

from shim_core import errors
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.types import RegistryAuth
from shim_porto_runtime.images.model import Image


def image(source: Image) -> pb.Image:
    """An image as lists and statuses show it."""
    message = pb.Image(
        id=source.id,
        repo_tags=source.repo_tags,
        repo_digests=source.repo_digests,
        size=source.size_bytes,
        username=source.username,
        spec=pb.ImageSpec(image=source.id),
        pinned=source.pinned,
    )
    if source.uid is not None:
        message.uid.value = source.uid
    return message


def named(spec: pb.ImageSpec) -> str:
    """The image that a request names.

    :raises errors.InvalidArgument: none.
    """
    if not spec.image:
        raise errors.InvalidArgument("image: must not be empty")
    return spec.image


def auth_of(request: pb.PullImageRequest) -> RegistryAuth | None:
    """The credentials that came with a pull; None when there are none in them."""
    auth = request.auth
    made = RegistryAuth(
        username=auth.username,
        password=auth.password,
        auth=auth.auth,
        server_address=auth.server_address,
        identity_token=auth.identity_token,
        registry_token=auth.registry_token,
    )
    return None if made == RegistryAuth(server_address=auth.server_address) else made
