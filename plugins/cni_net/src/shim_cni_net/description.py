"""An attachment as the runtime, and those who look at it, see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shim_cni_net import results, versions
from shim_cni_net.records import Attachment
from shim_cni_net.results import IpPreference
from shim_core.errors import Internal
from shim_core.types import NetworkAttachment


def ifname(index: int) -> str:
    """The interface that a pod's network of this number is reached by."""
    return f"eth{index}"


def addresses(result: Mapping[str, Any], preference: IpPreference) -> tuple[str, ...]:
    """A pod's addresses, from the result of its first network."""
    return results.addresses(results.convert(result, versions.KNOWN[-1]), ifname(0), preference)


def describe(attachment: Attachment, preference: IpPreference) -> NetworkAttachment:
    """What the hooks return for an attachment. Results are shown in the newest version, whatever the plugins spoke."""
    shown = [
        results.convert(progress.result, versions.KNOWN[-1])
        for progress in attachment.progress
        if progress.result is not None
    ]
    if not shown:
        raise Internal(f"sandbox {attachment.sandbox_id[:13]} is attached and has no CNI result")
    info: dict[str, Any] = {"cniResult": shown[0]}
    if len(shown) > 1:
        info["cniResults"] = {ifname(index): result for index, result in enumerate(shown)}
    return NetworkAttachment(
        netns_path=attachment.netns_path,
        addresses=addresses(shown[0], preference),
        interfaces=tuple(
            interface for index, result in enumerate(shown) for interface in results.interfaces(result, ifname(index))
        ),
        info=info,
    )
