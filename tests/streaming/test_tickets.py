"""Tokens: random, short-lived, good once, limited."""

from __future__ import annotations

import secrets
import threading
import time

import pytest
from shim_streaming.tickets import TOKEN, CommandTicket, ForwardTicket, Tickets

from shim_core.errors import ResourceExhausted

TICKET = CommandTicket("exec", "r", "c", ("true",))


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_a_token_is_256_random_bits() -> None:
    store = Tickets(5000, 60)
    tokens = {store.issue(TICKET) for _ in range(5000)}
    assert len(tokens) == 5000
    assert all(TOKEN.fullmatch(token) for token in tokens)


def test_a_token_is_good_once() -> None:
    store = Tickets(10, 60)
    token = store.issue(TICKET)
    assert store.take(token, "exec") is TICKET
    assert store.take(token, "exec") is None


def test_a_token_of_something_else_is_used_up() -> None:
    store = Tickets(10, 60)
    token = store.issue(ForwardTicket("r", "s"))
    assert store.take(token, "exec") is None
    assert store.take(token, "portforward") is None


def test_a_token_ends_after_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, store = Clock(monkeypatch), Tickets(10, 60)
    early, late = store.issue(TICKET), store.issue(TICKET)
    clock.now += 59.9
    assert store.take(early, "exec") is TICKET
    clock.now += 0.2
    assert store.take(late, "exec") is None
    assert len(store) == 0


def test_a_thousand_are_in_flight_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, store = Clock(monkeypatch), Tickets(1000, 60)
    tokens = [store.issue(TICKET) for _ in range(1000)]
    with pytest.raises(ResourceExhausted, match="1000 exec, attach and port-forward requests"):
        store.issue(TICKET)
    store.take(tokens[0], "exec")
    store.issue(TICKET)
    with pytest.raises(ResourceExhausted):
        store.issue(TICKET)
    clock.now += 61
    store.issue(TICKET)
    assert len(store) == 1


def test_of_many_takers_one_gets_it() -> None:
    store = Tickets(10, 60)
    token = store.issue(TICKET)
    barrier, got = threading.Barrier(16), []

    def take() -> None:
        barrier.wait()
        got.append(store.take(token, "exec"))

    threads = [threading.Thread(target=take) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [ticket for ticket in got if ticket] == [TICKET]


def test_guessing() -> None:
    store = Tickets(10, 60)
    store.issue(TICKET)
    assert not any(store.take(secrets.token_urlsafe(32), "exec") for _ in range(10_000))


def test_tokens_are_not_kept() -> None:
    store = Tickets(10, 60)
    token = store.issue(TICKET)
    assert token not in repr(vars(store))
