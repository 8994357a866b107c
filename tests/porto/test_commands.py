"""Commands: how a line is split, how an end is told, and what can't be executed."""

from __future__ import annotations

import pytest

from porto_api import Client, errors
from tests.porto.support import refused, run, shell, spec, start, state


@pytest.mark.parametrize(
    ("line", "stdout"),
    [
        ("echo a\\ b 'c d' \"e  f\"", "a b c d e  f\n"),
        ("echo ${PORTO_NAME} '$PORTO_NAME'", "a $PORTO_NAME\n"),
        ("echo  $((2 + 3))", "5\n"),
        ("echo ''", "\n"),
        ("  echo   x  ", "x\n"),
    ],
)
def test_a_line_is_expanded_as_wordexp_does(porto: Client, line: str, stdout: str) -> None:
    assert run(porto, "a", line).stdout == stdout


ILLEGAL = "illegal occurrence of newline or one of |, &, ;, <, >, (, ), {, }"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("echo '", "syntax error"),
        ("echo (", ILLEGAL),
        ("echo a; echo b", ILLEGAL),
        ("echo a | cat", ILLEGAL),
        ("echo a > /tmp/x", ILLEGAL),
        ("echo $(id)", "command substitution is not supported"),
        ("echo `id`", "command substitution is not supported"),
        ("echo ${NOPE}", "undefined shell variable was referenced"),
    ],
)
def test_a_line_that_takes_a_shell(porto: Client, line: str, reason: str) -> None:
    with refused(errors.InvalidCommand, f"wordexp(): {reason}"):
        start(porto, "a", line)


@pytest.mark.parametrize(
    "words", [["echo", "a b", "$HOME", "'x'"], ["echo", ""], ["echo", "tab\tand\\slash"], ["echo", "two\nlines", "ü"]]
)
def test_words_are_taken_as_they_are(porto: Client, words: list[str]) -> None:
    assert run(porto, "a", words).stdout == " ".join(words[1:]) + "\n"


def test_words_show_as_a_line_too(porto: Client) -> None:
    porto.create_from_spec(spec("a", ["echo", "it's", "a b"]))
    assert porto.get_property("a", "command") == "'echo' 'it'\\''s' 'a b' "
    assert porto.get_property("a", "command_argv") == "echo\tit's\ta b"
    assert porto.get_property("a", "command_argv[2]") == "a b"
    with refused(errors.InvalidProperty, "Invalid index"):
        porto.get_property("a", "command_argv[3]")
    porto.set_property("a", "command_argv[2]", "other")
    assert porto.get_property("a", "command_argv") == "echo\tit's\tother"


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        ("exit 0", 0, 0),
        ("exit 3", 3 << 8, 3),
        ("exit 128", 128 << 8, 128),
        ("exit 255", 255 << 8, 255),
        ("kill -TERM $$", 15, -15),
        ("kill -KILL $$", 9, -9),
    ],
)
def test_how_it_ended(porto: Client, script: str, status: int, code: int, isolate: bool) -> None:
    start(porto, "a", shell(script), isolate=isolate)
    assert porto.wait(["a"], 60).state == "dead"
    answer = porto.get(["a"], ["exit_status", "exit_code", "oom_killed", "core_dumped"])["a"]
    assert answer == {
        "exit_status": str(status),
        "exit_code": str(code),
        "oom_killed": "false",
        "core_dumped": "false",
    }


@pytest.mark.parametrize("isolate", [True, False])
def test_an_exit_code_that_looks_like_a_signal(porto: Client, isolate: bool) -> None:
    """It passes through an init, which tells signals by codes above 128."""
    assert run(porto, "a", shell("exit 137"), isolate=isolate).exit_code == -9


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("nonexistent", "No such file or directory"),
        ("/nonexistent", "No such file or directory"),
        ("/etc", "Permission denied"),
        ("/etc/passwd", "Permission denied"),
    ],
)
def test_what_cant_be_executed(porto: Client, program: str, reason: str, isolate: bool) -> None:
    message = f"{reason}: cannot exec {program}"
    porto.create_from_spec(spec("a", [program], isolate=isolate))
    with refused(errors.InvalidCommand, message):
        porto.start("a")
    assert state(porto, "a") == "stopped"
    assert porto.get_property("a", "start_error") == f"InvalidCommand:({message})"
    porto.set_property("a", "command", "true")
    porto.start("a")
    assert porto.get_property("a", "start_error") == ""


@pytest.mark.parametrize("line", ["", "   "])
def test_without_a_command_it_is_a_meta_container(porto: Client, line: str) -> None:
    porto.create("a")
    porto.set_property("a", "command", line)
    porto.start("a")
    assert state(porto, "a") == "meta"


class TestEnvironment:
    def test_what_a_command_finds(self, porto: Client) -> None:
        found = dict(line.split("=", 1) for line in run(porto, "a", ["env"]).lines)
        home = porto.get_property("/", "place").split(";")[0] + "/porto/a"
        host = found.pop("PORTO_HOST")
        assert host
        assert found == {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": home,
            "USER": "root",
            "container": "lxc",
            "PORTO_NAME": "a",
            "PORTO_USER": "root",
        }

    def test_what_is_set_wins_but_for_portos_own(self, porto: Client) -> None:
        env = {"PATH": "/usr/bin:/bin", "HOME": "/x", "NEW": "a b;c", "PORTO_NAME": "other"}
        script = 'echo "$PATH|$HOME|$NEW|$PORTO_NAME"'
        assert run(porto, "a", shell(script), env=env).stdout == "/usr/bin:/bin|/x|a b;c|a\n"

    def test_without_isolation_it_is_inherited(self, porto: Client) -> None:
        start(porto, "p", env={"A": "parent", "B": "parent"})
        script = shell('echo "$A $B"')
        assert run(porto, "p/x", script, isolate=False, env={"B": "child"}).stdout == "parent child\n"
        assert run(porto, "p/y", script, isolate=True, env={"B": "child"}).stdout == " child\n"

    def test_secrets_are_not_shown(self, porto: Client) -> None:
        porto.create("a")
        porto.set_property("a", "env_secret", "S=hidden")
        porto.set_property("a", "command_argv", "sh\t-c\techo $S")
        for name in ("env_secret", "env", "env[S]"):
            assert "hidden" not in porto.get_property("a", name)
        assert porto.get_property("a", "env_secret").startswith("S=<secret salt=")
        porto.start("a")
        porto.wait(["a"], 60)
        assert porto.get_property("a", "stdout") == "hidden\n"

    def test_one_variable_at_a_time(self, porto: Client) -> None:
        porto.create("a")
        porto.set_property("a", "env", "A=1;B=2")
        porto.set_property("a", "env[B]", "3")
        porto.set_property("a", "env[C]", "4")
        assert porto.get_property("a", "env") == "A=1;B=3;C=4"
        assert porto.get_property("a", "env[C]") == "4"


class TestSurroundings:
    def test_it_starts_in_a_directory_of_its_own(self, porto: Client) -> None:
        directory = porto.get_property("/", "place").split(";")[0] + "/porto/a"
        found = run(porto, "a", shell("pwd; stat -c '%a %u:%g' ."))
        assert found.lines == [directory, "775 0:0"]

    def test_in_a_root_of_its_own_it_starts_there(self, porto: Client, root: str) -> None:
        assert run(porto, "a", ["pwd"], root=root).stdout == "/\n"

    def test_the_directory_that_was_set(self, porto: Client, root: str) -> None:
        assert run(porto, "a", ["pwd"], cwd="/tmp").stdout == "/tmp\n"
        assert run(porto, "a", ["pwd"], cwd="/work", root=root).stdout == "/work\n"

    def test_a_directory_that_is_not_there(self, porto: Client) -> None:
        with refused(errors.InvalidPath, "No such file or directory: Cannot chdir /not/there"):
            start(porto, "a", cwd="/not/there")
        assert porto.list_containers() == []

    def test_umask_and_oom_score(self, porto: Client) -> None:
        script = shell("umask; cat /proc/self/oom_score_adj")
        assert run(porto, "a", script).lines == ["0002", "0"]
        # Portod writes the number down in decimal, and reads it as an octal one.
        assert run(porto, "a", script, umask=77, oom_score_adj=300).lines == ["0077", "300"]

    def test_limits_of_processes(self, porto: Client) -> None:
        porto.create("a")
        porto.set_property("a", "ulimit", "nofile: 100 200; core: 0")
        porto.set_property("a", "command_argv", "sh\t-c\tulimit -Sn; ulimit -Hn; ulimit -Hc")
        porto.start("a")
        porto.wait(["a"], 60)
        assert porto.get_property("a", "stdout") == "100\n200\n0\n"

    def test_a_soft_limit_above_the_hard_one(self, porto: Client) -> None:
        porto.create("a")
        porto.set_property("a", "command", "true")
        porto.set_property("a", "ulimit", "nofile: 200 100")
        with refused(errors.Unknown, "Invalid argument: prlimit 0 nofile 200 100"):
            porto.start("a")

    def test_a_session_of_its_own(self, porto: Client) -> None:
        found = run(porto, "a", shell("cut -d' ' -f1,5,6 /proc/$$/stat"), isolate=False)
        assert len(set(found.stdout.split())) == 1

    def test_no_signal_is_blocked(self, porto: Client) -> None:
        assert run(porto, "a", ["grep", "SigBlk", "/proc/self/status"]).stdout.split() == ["SigBlk:", "0" * 16]

    def test_no_descriptors_but_its_own(self, porto: Client) -> None:
        assert run(porto, "a", ["ls", "/proc/self/fd"]).stdout.split() == ["0", "1", "2", "3"]
