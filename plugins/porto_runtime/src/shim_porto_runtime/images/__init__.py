"""Images: pulled from registries, verified, kept as Porto layers.

::

    reference ─ registry ─ puller ─┬─ download      a blob, to a file, by its digest
                                   └─ layers        a blob, to a Porto layer (compression, tar, unpack)
    store        what there is, in SQLite and in memory
    archive      images as files
    service      the CRI's ImageService on top
"""

from shim_porto_runtime.images.documents import ImageConfig
from shim_porto_runtime.images.model import Image
from shim_porto_runtime.images.service import ImageService
from shim_porto_runtime.images.settings import ImageSettings

__all__ = ["Image", "ImageConfig", "ImageService", "ImageSettings"]
