"""What is checked before a start: whether the client may start this, and whether what was set goes together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shim_embedded_porto import capabilities, credentials
from shim_embedded_porto.client import Client
from shim_embedded_porto.container import Container
from shim_embedded_porto.errors import Fault, invalid_value, permission
from shim_embedded_porto.properties.base import Context
from shim_embedded_porto.properties.registry import PROPERTIES

if TYPE_CHECKING:
    from shim_embedded_porto.porto import Porto


def prepare_start(porto: Porto, ct: Container, client: Client) -> None:
    """Fill in what depends on the container's mode, then check everything.

    :raises Fault: it can't be started, or not by this client.
    """
    client.check_cred(ct.owner)
    ctx = Context(porto, client)
    for prop in PROPERTIES.values():
        prop.start(ct, ctx)
    ct.cred = ct.cred.with_groups()
    ct.sanitize_capabilities()
    _check_cred(ct, client)
    _check_mode(ct, client)
    _check_capabilities(ct)
    _check_places(porto, ct)


def _check_cred(ct: Container, client: Client) -> None:
    if not _controls_cred(ct, client):
        # In a root of its own a container may run as anybody; so may one whose parent could become anybody.
        inside = client.sets_ids and ct.child_of(client.container)
        if ct.root_path == "/" and not inside:
            client.check_cred(ct.cred)
            raise permission(f"Cannot control group {ct.cred.group}")
    if ct.root_path == "/" and ct.cred.uid == 0 and ct.owner.uid != 0:
        raise permission("user=root requires chroot")


def _controls_cred(ct: Container, client: Client) -> bool:
    try:
        client.check_cred(ct.cred)
    except Fault:
        return False
    if ct.owner.member_of(ct.cred.gid) or client.superuser:
        return True
    try:
        return credentials.by_name(str(ct.cred.uid)).member_of(ct.cred.gid)
    except Fault:
        return False


def _check_mode(ct: Container, client: Client) -> None:
    assert ct.parent is not None
    if ct.host_mode:
        if not ct.parent.host_mode:
            raise permission("For virt_mode=host parent must be in the same mode")
        if not client.container.host_mode:
            raise permission("For virt_mode=host client must be in the same mode")
    if ct.job_mode and ct.level == 1:
        raise invalid_value("Container in virt_mode=job without parent")
    if ct.parent.job_mode:
        raise invalid_value("Parent container in virt_mode=job")
    if ct.job_mode and ct.required_controllers:
        raise invalid_value("Cannot use cgroups in virt_mode=job")
    if ct.job_mode and ct.is_meta:
        raise invalid_value("Job container without command considered useless")
    if "userns" in ct.assigned:
        if ct.userns and (ct.host_mode or ct.job_mode):
            raise invalid_value("userns=true incompatible with virt_mode")
    elif ct.fuse:
        ct.userns = ct.unshare_on_exec = True
        ct.assigned.add("userns")


def _check_capabilities(ct: Container) -> None:
    excess = ct.cap_bound & ~ct.cap_limit
    restricted = (ct.owner.uid != 0 and not ct.host_mode) or "capabilities" in ct.assigned
    if excess and restricted:
        raise permission(f"Capabilities out of bounds: {capabilities.format_set(excess)}")
    excess = ct.cap_ambient & ~ct.cap_bound
    if excess:
        raise permission(f"Ambient capabilities out of bounds: {capabilities.format_set(excess)}")


def _check_places(porto: Porto, ct: Container) -> None:
    """A container may use no other places than its parent."""
    assert ct.parent is not None
    if "place" not in ct.assigned:
        ct.place_policy = list(ct.parent.place_policy)
        return
    for policy in ct.place_policy:
        _, wildcard, tail = policy.partition("***")
        if wildcard and tail.strip("*/"):
            raise permission("Wildcard allowed only at the end of the place")
        refused = permission(f"Place {policy} is not allowed by parent container")
        place = policy
        if not policy.startswith("/"):
            if policy == "***":
                if policy not in ct.parent.place_policy:
                    raise refused
                continue
            _, separator, path = policy.partition("=")
            if separator and path.startswith("/"):
                place = path
        try:
            porto.storages.resolve_place(place, ct.parent)
        except Fault:
            raise refused from None
