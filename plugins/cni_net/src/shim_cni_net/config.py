"""The ``CNI`` section of the configuration file."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator

from shim_core.config import AbsolutePath, Duration, Section

NETNS = "netns"


def _directories(value: object) -> object:
    """A string or a list; colons separate directories, as they do in CNI_PATH."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return tuple(directory for item in value for directory in item.split(":") if directory)
    return value


class CniSection(Section):
    """``CNI``: how pods get their network."""

    section: ClassVar[str] = "CNI"

    conf_dir: AbsolutePath = Field(
        "/etc/cni/net.d", description="Network configurations; the first file by name is the pods' network."
    )
    bin_dir: Annotated[tuple[AbsolutePath, ...], BeforeValidator(_directories)] = Field(
        ("/opt/cni/bin",), description="Where CNI plugins are searched: a directory or a list of them."
    )
    netns_dir: AbsolutePath = Field("/var/run/netns", description="Where network namespaces are pinned.")
    net_type: str = Field(
        NETNS,
        min_length=1,
        description="netns: namespaces made here. Anything else: Porto's own L3 network, with addresses from CNI.",
    )
    max_conf_num: int = Field(
        1, ge=0, description="How many networks of ConfDir a pod joins, as eth0, eth1, ...; 0 is all of them."
    )
    ip_preference: Literal["ipv4", "ipv6", "cni"] = Field(
        "ipv4", description="Which address of a dual-stack pod is the first: ipv4, ipv6, or the CNI result's order."
    )
    conf_template: AbsolutePath | Literal[""] = Field(
        "",
        description="Template of a network configuration, rendered into ConfDir when kubelet tells the pod CIDR.",
    )
    add_timeout: Duration = Field(90.0, description="How long connecting a pod may take, all plugins together.")
    del_timeout: Duration = Field(60.0, description="How long disconnecting a pod may take, all plugins together.")

    @field_validator("bin_dir")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("must name at least one directory")
        return value

    @field_validator("add_timeout", "del_timeout")
    @classmethod
    def _positive(cls, value: float) -> float:
        if value <= 0:
            raise ValueError("must be longer than 0s")
        return value
