"""A short run of the fuzzer; ``make fuzz`` is the long one."""

from __future__ import annotations

import random

import pytest

from tests.streaming import fuzz


def test_a_few_thousand_cases() -> None:
    fuzz.run(5_000, seed=random.SystemRandom().randrange(1 << 40))


def test_the_fuzzer_notices_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(_data: bytes) -> None:
        raise IndexError("bug")

    monkeypatch.setattr(fuzz, "READERS", {"broken": ("spdy", lambda: crash)})
    with pytest.raises(fuzz.Failure, match=r"(?s)broken, seed 7:.*IndexError: bug"):
        fuzz.run_case(7)
