"""The comparison with conmon runs, and comes out as it should."""

from __future__ import annotations

import shutil

import pytest

from tools import bench_keeper


@pytest.mark.skipif(shutil.which("conmon") is None, reason="conmon isn't installed")
def test_a_few_dozen_containers_cost_less_than_with_conmon() -> None:
    rows = {row.name.split(",")[0]: row for row in bench_keeper.rows(containers=40, seconds=4.0)}
    memory = rows["memory of 40 writing containers"]
    assert memory.ratio is not None
    assert memory.ratio < 1
    rate = rows["output logged"]
    assert rate.ours == pytest.approx(2.0, rel=0.2)
    assert rate.conmon == pytest.approx(2.0, rel=0.2)
