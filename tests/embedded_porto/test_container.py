"""What follows for a container from what was set on it and on those above it."""

from __future__ import annotations

import os
import threading

import pytest
from shim_embedded_porto import capabilities, states
from shim_embedded_porto.access import Access
from shim_embedded_porto.container import Container
from shim_embedded_porto.credentials import Cred
from shim_embedded_porto.errors import Fault
from shim_embedded_porto.tree import Tree


@pytest.fixture
def tree() -> Tree:
    return Tree("/work", {"freezer"}, {"memory"})


def add(tree: Tree, name: str) -> Container:
    with tree.lock:
        return tree.add(name, superuser=True)


class TestContainer:
    def test_where_it_starts(self, tree: Tree) -> None:
        a, b = add(tree, "a"), add(tree, "a/b")
        assert a.working_directory() == "/work/a"
        a.cwd = "/x"
        assert b.working_directory() == "/x"
        b.cwd = "y"
        assert b.working_directory() == "/x/y"
        b.root = "/root"
        assert b.working_directory() == "/y"
        b.cwd = ""
        assert b.working_directory() == "/"

    def test_variables_are_inherited_up_to_an_isolated_one(self, tree: Tree) -> None:
        a, b, c = add(tree, "a"), add(tree, "a/b"), add(tree, "a/b/c")
        a.env, b.env, c.env = "X=a;A=a", "X=b;B=b", "X=c"
        c.isolate = False
        b.isolate = False
        values = c.environment("host").values()
        assert (values["X"], values["A"], values["B"]) == ("c", "a", "b")
        b.isolate = True
        assert "A" not in c.environment("host").values()

    @pytest.mark.parametrize(
        ("status", "killed", "code"),
        [(0, False, 0), (3 << 8, False, 3), (9, False, -9), (9, True, -99), (0, True, -99)],
    )
    def test_exit_codes(self, tree: Tree, status: int, killed: bool, code: int) -> None:
        ct = add(tree, "a")
        assert ct.exit_code() == 256
        ct.state, ct.exit_status, ct.oom_killed = states.DEAD, status, killed
        assert ct.exit_code() == code

    def test_the_lowest_memory_limit(self, tree: Tree) -> None:
        a, b = add(tree, "a"), add(tree, "a/b")
        assert b.effective_memory_limit(100) == 100
        a.memory_limit, b.memory_limit = 50, 70
        assert b.effective_memory_limit(100) == 50
        assert b.explicit_memory_limit() == 0
        b.assigned.add("memory_limit")
        assert b.explicit_memory_limit() == 70

    def test_capabilities(self, tree: Tree) -> None:
        a, b = add(tree, "a"), add(tree, "a/b")
        a.owner = b.owner = Cred(1000, 1000)
        a.cap_limit = capabilities.mask("CHOWN", "KILL")
        a.assigned.add("capabilities")
        b.cap_limit = capabilities.mask("CHOWN", "SYS_ADMIN")
        b.assigned.add("capabilities")
        a.sanitize_capabilities()
        assert b.cap_bound == capabilities.mask("CHOWN")

    def test_names_of_its_clients(self, tree: Tree) -> None:
        a, b = add(tree, "a"), add(tree, "a/b")
        assert b.namespace() == ""
        a.access = Access.ISOLATE
        assert b.namespace() == "a/"
        b.porto_namespace = "x-"
        assert b.namespace() == "a/x-"
        b.access = Access.CHILD_ONLY
        assert b.namespace(write=True) == "a/b/"

    def test_roots_in_roots(self, tree: Tree) -> None:
        a, b, c = add(tree, "a"), add(tree, "a/b"), add(tree, "a/b/c")
        a.root, c.root = "/one", "/two/../three"
        a.update_root_path()
        assert [ct.root_path for ct in (a, b, c)] == ["/one", "/one", "/one/three"]


class TestTree:
    def test_names_and_numbers_are_given_once(self, tree: Tree) -> None:
        a = add(tree, "a")
        with pytest.raises(Fault, match="already exists"):
            add(tree, "a")
        with pytest.raises(Fault, match="parent container not found"):
            add(tree, "x/y")
        number = a.id
        tree.remove(a)
        assert add(tree, "a").id != number
        assert [ct.name for ct in tree.all()] == ["/", "a"]

    def test_one_writer_or_many_readers(self, tree: Tree) -> None:
        a = add(tree, "a")
        with tree.locked(a, shared=True), tree.locked(a, shared=True):
            assert not self._gets_in(tree, a)
            assert self._gets_in(tree, a, shared=True)
        with tree.locked(a):
            assert not self._gets_in(tree, a, shared=True)
        assert self._gets_in(tree, a)

    def test_families(self, tree: Tree) -> None:
        a, b, c = add(tree, "a"), add(tree, "a/b"), add(tree, "c")
        with tree.locked(b):
            assert not self._gets_in(tree, a)
            assert self._gets_in(tree, a, shared=True)
            assert self._gets_in(tree, c)
        with tree.locked(a):
            assert not self._gets_in(tree, b, shared=True)

    def test_a_slow_step_lets_readers_in(self, tree: Tree) -> None:
        a = add(tree, "a")
        with tree.locked(a):
            with tree.downgraded(a):
                assert self._gets_in(tree, a, shared=True)
                assert not self._gets_in(tree, a)
            assert not self._gets_in(tree, a, shared=True)

    def test_what_was_destroyed_meanwhile(self, tree: Tree) -> None:
        a = add(tree, "a")
        found: list[Fault] = []

        def wait() -> None:
            try:
                tree.acquire(a)
            except Fault as fault:
                found.append(fault)

        with tree.locked(a):
            thread = threading.Thread(target=wait)
            thread.start()
            tree.remove(a)
        thread.join(timeout=60)
        assert [fault.text for fault in found] == ["Container was destroyed"]

    @staticmethod
    def _gets_in(tree: Tree, ct: Container, *, shared: bool = False) -> bool:
        """Whether another thread would have to wait."""
        with tree.lock:
            return not tree._busy(ct, shared)


def test_the_machines_processors_are_the_roots(tree: Tree) -> None:
    assert tree.root.cpu_limit == (os.cpu_count() or 1) * 10**9
