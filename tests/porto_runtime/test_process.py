"""From CRI's and the image's configuration to the process that runs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shim_porto_runtime import process
from shim_porto_runtime.users import User

from porto_api import rpc_pb2
from shim_core.cri.v1 import api_pb2 as pb
from shim_core.errors import InvalidArgument

ROOT = User(0, 0, ())


@dataclass(frozen=True)
class Image:
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    working_dir: str = ""


def build(config: pb.ContainerConfig, image: Image = Image(cmd=("sh",)), user: User = ROOT) -> process.Process:
    return process.build(config, image, user)


def environment(config: pb.ContainerConfig, image: Image = Image()) -> dict[str, bytes]:
    return process.environment(config, image, ROOT, "web-0")


@pytest.mark.parametrize(
    ("command", "args", "expected"),
    [
        ([], [], ["entry", "cmd"]),
        (["c"], [], ["c"]),
        ([], ["a"], ["entry", "a"]),
        (["c"], ["a"], ["c", "a"]),
    ],
)
def test_command_and_args_replace_as_the_cri_says(command: list[str], args: list[str], expected: list[str]) -> None:
    config = pb.ContainerConfig(command=command, args=args)
    assert list(build(config, Image(("entry",), ("cmd",))).argv) == expected


def test_no_command_anywhere_is_named() -> None:
    with pytest.raises(InvalidArgument, match="command: empty, and the image has neither ENTRYPOINT nor CMD"):
        build(pb.ContainerConfig(), Image())


def test_the_environment_is_the_images_then_the_configs() -> None:
    config = pb.ContainerConfig(envs=[pb.KeyValue(key="A", value=b"2"), pb.KeyValue(key="A", value=b" x;y z\n\xff ")])
    env = environment(config, Image(env=("A=1", "PATH=/bin", "broken")))
    assert env == {"PATH": b"/bin", "HOSTNAME": b"web-0", "HOME": b"/", "A": b" x;y z\n\xff "}
    assert process.environment_file({"A": b"1\n", "B": b""}) == b"A=1\n\0B=\0"


@pytest.mark.parametrize(("key", "value"), [("", b""), ("A=B", b""), ("A", b"\0"), ("A\0", b"")])
def test_what_no_environment_can_hold_is_refused(key: str, value: bytes) -> None:
    with pytest.raises(InvalidArgument, match="envs"):
        environment(pb.ContainerConfig(envs=[pb.KeyValue(key=key, value=value)]))


def test_one_containers_environment_does_not_reach_another() -> None:
    image = Image(env=("A=image",))
    for n in range(50):
        config = pb.ContainerConfig(envs=[pb.KeyValue(key=f"ONLY{n}", value=str(n).encode())])
        assert [name for name in environment(config, image) if name.startswith("ONLY")] == [f"ONLY{n}"]
    assert image.env == ("A=image",)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("", ""), ("/", "/"), ("/a/b/", "/a/b"), ("a", "/a"), ("/./a//b", "/a/b"), ("/proc", "/proc")],
)
def test_working_directories(given: str, expected: str) -> None:
    assert build(pb.ContainerConfig(working_dir=given)).cwd == expected
    assert build(pb.ContainerConfig(), Image(cmd=("sh",), working_dir=given)).cwd == expected


@pytest.mark.parametrize("path", ["/proc/self/fd/7", "/proc/self/fd/8/../../..", "../..", "/a/../../x", "/a\0b"])
def test_working_directories_that_lead_elsewhere_are_refused(path: str) -> None:
    with pytest.raises(InvalidArgument, match="working_dir"):
        build(pb.ContainerConfig(working_dir=path))
    with pytest.raises(InvalidArgument, match="WorkingDir of the image"):
        build(pb.ContainerConfig(), Image(cmd=("sh",), working_dir=path))


def test_the_config_wins_over_the_image() -> None:
    assert build(pb.ContainerConfig(working_dir="/c"), Image(cmd=("sh",), working_dir="/i")).cwd == "/c"


def test_init_is_told_everything() -> None:
    config = pb.ContainerConfig(command=["run", "-x"], working_dir="/w")
    config.linux.security_context.no_new_privs = True
    config.linux.security_context.capabilities.drop_capabilities.append("ALL")
    config.linux.security_context.capabilities.add_ambient_capabilities.append("NET_BIND_SERVICE")
    spec = rpc_pb2.TContainerSpec(name="c")
    process.into_spec(build(config, user=User(1000, 100, (5, 6))), spec, "start-1")
    assert " ".join(spec.command_argv.argv) == (
        "/.portoshim/init -e /.portoshim/start-1 -E /.portoshim/env -d /w -m 22 -u 1000 -g 100 -G 5,6 -b 400 -a 400 -n"
        " -- run -x"
    )
    assert not spec.HasField("env")


text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@given(st.lists(text, min_size=1), st.integers(0, 2**31 - 1), st.booleans(), st.lists(text))
def test_a_recorded_process_is_the_same_process(argv: list[str], uid: int, tty: bool, setup: list[str]) -> None:
    made = process.Process(tuple(argv), "/", uid, 0, (1, 2), 5, tty=tty, join=("-I", "x"), setup=tuple(setup))
    assert process.Process.from_json(json.loads(json.dumps(made.as_json()))) == made


def test_exec_runs_in_the_same_surroundings() -> None:
    made = build(pb.ContainerConfig(working_dir="/w"), user=User(7, 8, (9,)))
    other = process.for_exec(made, ["ls"], tty=True)
    assert (other.argv, other.cwd, other.uid, other.groups, other.tty) == (("ls",), "/w", 7, (9,), True)
    assert "TERM=xterm" in process.init_options(other, "f")
    assert "TERM=xterm" not in process.init_options(dataclasses.replace(other, has_term=True), "f")
    prepared = dataclasses.replace(made, join=("-I", "x"), setup=("-O",))
    again = process.for_exec(prepared, ["ls"], tty=False)
    assert (again.join, again.setup) == (("-I", "x"), ())
    with pytest.raises(InvalidArgument, match="cmd"):
        process.for_exec(made, [], tty=False)
