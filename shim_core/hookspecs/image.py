"""One hook for each call of CRI's ImageService."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from shim_core.hookspecs import hookspec

if TYPE_CHECKING:
    from shim_core.context import CallContext
    from shim_core.cri.v1 import api_pb2 as pb


class ImageSpec:
    """Hooks of ``runtime.v1.ImageService``."""

    @hookspec(firstresult=True)
    def cri_list_images(self, request: pb.ListImagesRequest, context: CallContext) -> pb.ListImagesResponse | None:
        """Images in the store: all, or the one the filter names."""

    @hookspec(firstresult=True)
    def cri_stream_images(
        self, request: pb.StreamImagesRequest, context: CallContext
    ) -> Iterator[pb.StreamImagesResponse] | None:
        """As ``cri_list_images``, in messages of limited size; each image once."""

    @hookspec(firstresult=True)
    def cri_image_status(self, request: pb.ImageStatusRequest, context: CallContext) -> pb.ImageStatusResponse | None:
        """One image. A missing one is an answer without ``image``, not an error: kubelet then pulls it."""

    @hookspec(firstresult=True)
    def cri_pull_image(self, request: pb.PullImageRequest, context: CallContext) -> pb.PullImageResponse | None:
        """Fetch an image, every digest verified. Returns its id.

        :raises UnknownError: kubelet reads the text only under this code; it never holds a secret.
        """

    @hookspec(firstresult=True)
    def cri_remove_image(self, request: pb.RemoveImageRequest, context: CallContext) -> pb.RemoveImageResponse | None:
        """Remove an image with all its tags. Idempotent; an unknown image is success."""

    @hookspec(firstresult=True)
    def cri_image_fs_info(self, request: pb.ImageFsInfoRequest, context: CallContext) -> pb.ImageFsInfoResponse | None:
        """What images and writable layers take up: kubelet's image collection stands on it."""
