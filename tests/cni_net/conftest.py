"""A fresh node for every test of this area, whatever the one before has left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import stage


@pytest.fixture(autouse=True)
def _clean_stage() -> Iterator[None]:
    """Take away what a test, failed or not, has left on the stage, so that none sees another's."""
    yield
    if not stage.on_stage():
        return
    for name in os.listdir("/run/netns"):
        subprocess.run(["umount", "-l", f"/run/netns/{name}"], check=False, capture_output=True)
        Path("/run/netns", name).unlink()
    links = json.loads(subprocess.run(["ip", "-j", "link"], check=True, capture_output=True).stdout)
    for link in links:
        if link["ifname"] != "lo":
            subprocess.run(["ip", "link", "del", link["ifname"]], check=False, capture_output=True)
    subprocess.run(["nft", "flush", "ruleset"], check=True)
    for path in Path("/var/lib/cni").iterdir():
        shutil.rmtree(path)
