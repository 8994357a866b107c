"""A container's end is never told of before its start, and never missed."""

from __future__ import annotations

from shim_porto_runtime.starts import Starts


def test_an_end_during_the_start_waits_for_it() -> None:
    starts = Starts()
    with starts.under_way("one"):
        assert starts.put_off("one")
        assert starts.put_off("one")
        assert starts.finish("one")
        assert not starts.put_off("one")


def test_an_end_at_any_other_time_does_not() -> None:
    starts = Starts()
    assert not starts.put_off("one")
    with starts.under_way("one"):
        assert not starts.put_off("two")
        assert not starts.finish("one")
    assert not starts.put_off("one")


def test_a_start_that_failed_leaves_nothing() -> None:
    starts = Starts()
    try:
        with starts.under_way("one"):
            starts.put_off("one")
            raise OSError
    except OSError:
        pass
    assert not starts.put_off("one")
    with starts.under_way("one"):
        assert not starts.finish("one")
