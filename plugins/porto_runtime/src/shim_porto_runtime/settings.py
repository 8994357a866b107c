"""The section ``Porto`` of the configuration."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, field_validator

from shim_core.config import AbsolutePath, Duration, Section


class PortoSection(Section):
    """How to reach Porto, and where in it to put pods."""

    section: ClassVar[str] = "Porto"

    runtime_name: str = Field("porto", description="What the CRI call Version answers as the runtime's name.")
    socket: AbsolutePath = Field("/run/portod.socket", description="The socket of portod.")
    socket_timeout: Duration = Field(300.0, description="How long a call to portod may take.")
    images_dir: AbsolutePath = Field(
        "/place/porto_docker",
        description="The directory whose filesystem holds the images, when Images.Place names none.",
    )
    parent_container: str = Field(
        "",
        description="A Porto container to run all pods in; empty: the top level. It has to run, with all capabilities.",
    )

    cdi_spec_dirs: tuple[AbsolutePath, ...] = Field(
        ("/etc/cdi", "/var/run/cdi"),
        alias="CDISpecDirs",
        description="Where devices of the Container Device Interface are described; a later directory goes before.",
    )

    @field_validator("socket_timeout")
    @classmethod
    def _positive(cls, value: float) -> float:
        if value <= 0:
            raise ValueError("must be longer than nothing, such as 5m")
        return value

    @field_validator("parent_container")
    @classmethod
    def _porto_name(cls, value: str) -> str:
        name = value.strip("/")
        if len(name) > 64:
            # 64 + 64 for the pod, 64 for the container, the rest for exec: Porto allows 200.
            raise ValueError("must not be longer than 64 characters: Porto limits whole names to 200")
        if name and not all(part.replace("-", "").replace("_", "").isalnum() for part in name.split("/")):
            raise ValueError("must be the name of a Porto container: letters, digits, - and _, parts separated by /")
        return name
