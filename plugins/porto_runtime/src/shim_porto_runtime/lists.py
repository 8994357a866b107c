"""The streaming lists: as their unary twins, in messages that stay small however many things there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from google.protobuf.message import Message

MAX_ITEMS = 256
MAX_BYTES = 2 * 1024 * 1024

Item = TypeVar("Item", bound=Message)
Response = TypeVar("Response", bound=Message)


def batches(items: Iterable[Item], wrap: Callable[[list[Item]], Response]) -> Iterator[Response]:
    """Responses with the items in order, each item once; none at all for nothing.

    A message ends before it would exceed :data:`MAX_BYTES`, unless a single item does.
    """
    batch: list[Item] = []
    size = 0
    for item in items:
        item_size = item.ByteSize()
        if batch and (len(batch) >= MAX_ITEMS or size + item_size > MAX_BYTES):
            yield wrap(batch)
            batch, size = [], 0
        batch.append(item)
        size += item_size
    if batch:
        yield wrap(batch)
