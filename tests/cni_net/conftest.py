"""A fresh node for every test of this area, whatever the one before has left."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cni_net.support import clean_stage


@pytest.fixture(scope="package", autouse=True)
def _clean_start() -> None:
    """Tests of other areas may have run here, and a bridge stays when its pods go."""
    clean_stage()


@pytest.fixture(autouse=True)
def _clean_stage() -> Iterator[None]:
    """Take away what a test, failed or not, has left on the stage, so that none sees another's."""
    yield
    clean_stage()
