"""The configuration: what is accepted, and what a mistake is answered with."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic.alias_generators import to_pascal

from shim_core import config
from shim_core.config import Config, Duration, PluginsSection, PortoshimSection, Section
from shim_core.errors import ConfigError


class Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", alias_generator=to_pascal, frozen=True)
    host: str
    auth_token: SecretStr = SecretStr("")


class Alpha(Section):
    section: ClassVar[str] = "Images"
    place: str = Field("", description="Where.")
    socket_timeout: Duration = Field(300.0, description="How long.")


class Beta(Section):
    section: ClassVar[str] = "Images"
    registries: tuple[Entry, ...] = ()


SECTIONS: list[type[Section]] = [PortoshimSection, PluginsSection, Alpha, Beta]


def parse(text: str) -> Config:
    import yaml

    return config.parse(yaml.safe_load(text) or {}, SECTIONS, "/etc/portoshim.yaml")


def mistakes(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return str(caught.value)


def test_two_plugins_share_a_section() -> None:
    parsed = parse("Images: {Place: /p, Registries: [{Host: a.example}]}")
    assert parsed.get(Alpha).place == "/p"
    assert parsed.get(Beta).registries[0].host == "a.example"


def test_empty_sections_and_keys_mean_the_defaults() -> None:
    parsed = parse("Images:\nPortoshim:\n  Socket:\n")
    assert parsed.get(PortoshimSection).socket == "/run/portoshim.sock"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Image: {Place: x}", "/etc/portoshim.yaml: Image: unknown section; did you mean Images?"),
        ("Images: {place: x}", "/etc/portoshim.yaml: Images.place: unknown key; did you mean Place?"),
        ("Images: {SocketTimeot: 5m}", "Images.SocketTimeot: unknown key; did you mean SocketTimeout?"),
        ("Images: [1]", "/etc/portoshim.yaml: Images: must be a mapping of keys, not a list"),
        ("Images: {Registries: [{Hots: a}]}", "Images.Registries[0].Hots: unknown key; did you mean Host?"),
        ("Images: {Registries: [{}]}", "Images.Registries[0].Host: field required"),
        ("Images: {SocketTimeout: 300}", "Images.SocketTimeout: not a duration: write a number with its unit"),
        ("Portoshim: {Socket: run/x.sock}", "Portoshim.Socket: must be an absolute path"),
    ],
)
def test_a_mistake_names_file_key_and_fix(text: str, expected: str) -> None:
    assert expected in mistakes(text)


def test_all_mistakes_are_told_at_once() -> None:
    assert len(mistakes("Imags: {}\nPortoshim: {Sockt: /x, LogsDir: x}").splitlines()) == 3


def test_secrets_are_in_neither_dump_nor_error() -> None:
    parsed = parse("Images: {Registries: [{Host: a, AuthToken: S3CR3T}]}")
    assert "S3CR3T" not in parsed.dump()
    assert "S3CR3T" not in parsed.describe()
    assert "S3CR3T" not in mistakes("Images: {Registries: [{Host: a, AuthToken: {x: S3CR3T}}]}")


def test_a_dump_is_a_configuration() -> None:
    once = parse("Images: {Place: /p, SocketTimeout: 90s}").dump()
    assert parse(once).dump() == once
    assert "SocketTimeout: 1m30s" in once


def test_description_is_a_configuration_too() -> None:
    text = parse("").describe()
    assert "  # How long.\n  SocketTimeout: 5m\n" in text
    assert parse(text).dump() == parse("").dump()


def test_plugins_may_not_define_one_key_twice() -> None:
    class Clash(Section):
        section: ClassVar[str] = "Images"
        place: str = ""

    with pytest.raises(ConfigError, match=r"plugin b and plugin a both define the configuration key Images\.Place"):
        config.check_collisions([("plugin a", Alpha), ("plugin b", Clash)])


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5m", 300),
        ("1m30s", 90),
        ("1.5h", 5400),
        ("250ms", 0.25),
        ("0", 0),
        ("1h0m1s", 3601),
        ("10us", 1e-5),
        (".5s", 0.5),
    ],
)
def test_durations_are_those_of_go(text: str, seconds: float) -> None:
    assert config.parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "m", "5 m", "5m3", "-5m", "5x", None, 5, True, [], "1m,30s", "٣s3"])
def test_other_things_are_no_durations(text: object) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        config.parse_duration(text)


@given(st.integers(0, 10**6))
def test_durations_survive_a_round_trip(milliseconds: int) -> None:
    seconds = milliseconds / 1000
    assert config.parse_duration(config.format_duration(seconds)) == pytest.approx(seconds)


class TestFile:
    def test_a_missing_default_file_is_fine(self, tmp_path: Path) -> None:
        assert config.read_file(str(tmp_path / "none"), required=False) == {}

    def test_a_missing_named_file_is_not(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no such file"):
            config.read_file(str(tmp_path / "none"), required=True)

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"a: [", "not valid YAML: line 1"),
            (b"- 1", "must be a mapping of sections, not a list"),
            (b"A: {}\nB: {}\nA: {}", "line 3: the key A stands twice"),
            (b"a: !!python/object/apply:os.system [true]", "not valid YAML"),
            (b"\xff\xfe\x00", "not valid YAML"),
            (b"a: " + b"[" * 5000, "not valid YAML"),
            (b"#" * (config.MAX_FILE_BYTES + 1), "larger than"),
        ],
    )
    def test_a_broken_file_is_an_error_of_one_line(self, tmp_path: Path, content: bytes, expected: str) -> None:
        path = tmp_path / "portoshim.yaml"
        path.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            config.read_file(str(path), required=True)
        assert expected in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1

    def test_an_alias_bomb_costs_nothing(self, tmp_path: Path) -> None:
        levels = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
        path = tmp_path / "portoshim.yaml"
        path.write_text("Images:\n" + "".join(f"  {line}\n" for line in levels))
        with pytest.raises(ConfigError, match=r"Images\.a9: unknown key"):
            config.parse(config.read_file(str(path), required=True), SECTIONS, str(path))
