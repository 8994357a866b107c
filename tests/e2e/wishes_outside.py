"""Wishes for what a container has of the node: mounts, devices, resources, a log."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from shim_core.cri.v1 import api_pb2 as pb
from tests.e2e.cases import CDI_KIND, MIB, Case, Draw, Seen, contained, equal
from tests.e2e.view import mount_of

# -- wishes: mounts and devices ----------------------------------------------------------------------------------------

_TARGETS = (
    "/data",
    "/data/below/here",
    "/new/place",
    "/a b;\\é",
    "/opt/x/y",
    "/run/x",
    "/tmp/x",
    "/dev/x/dir",
)


def mounts(draw: Draw, case: Case) -> None:
    for target in draw(st.lists(st.sampled_from(_TARGETS), unique=True, min_size=1, max_size=3)):
        if target in case.targets:
            continue
        case.targets.add(target)
        name = draw(st.sampled_from(tuple(case.around.sources)))
        mount = case.config.mounts.add(container_path=target, host_path=str(case.around.sources[name]))
        mount.readonly = draw(st.booleans())
        mount.selinux_relabel = draw(st.booleans())
        modes = [pb.PROPAGATION_PRIVATE, pb.PROPAGATION_HOST_TO_CONTAINER]
        mount.propagation = draw(st.sampled_from([*modes, pb.PROPAGATION_BIDIRECTIONAL] if name == "shared" else modes))
        private = mount.propagation == pb.PROPAGATION_PRIVATE
        mount.recursive_read_only = mount.readonly and private and draw(st.booleans())
        mount.mount_options.extend(draw(st.lists(st.sampled_from(("noexec", "nosuid", "nodev")), unique=True)))
        _check_mount(case, mount, name)


def _check_mount(case: Case, mount: pb.Mount, name: str) -> None:
    target = mount.container_path
    options = set(mount.mount_options) | ({"noexec", "nosuid", "nodev"} if name == "strict" else set())

    def check(seen: Seen) -> None:
        found = seen.view.mount(target)
        equal(set(found.options) & {"noexec", "nosuid", "nodev"}, options, f"options of {target}")
        equal("ro" in found.options, mount.readonly, f"{target} is read-only")
        if name == "nested":
            below = seen.view.mount(f"{target}/below")
            equal("ro" in below.options, mount.recursive_read_only, f"{target}/below is read-only")
            equal("nosuid" in below.options, False, f"{target}/below is nosuid")
        if name == "shared":
            group = next(m for m in _host_mounts() if m.point == str(case.around.sources["shared"])).propagation[
                "shared"
            ]
            if mount.propagation == pb.PROPAGATION_BIDIRECTIONAL:
                equal(found.propagation.get("shared"), group, "peer group")
            elif mount.propagation == pb.PROPAGATION_HOST_TO_CONTAINER:
                # Of the host's mount, or of a slave of it: the runtime has a mount namespace of its own.
                assert "master" in found.propagation
            else:
                assert group not in found.propagation.values()

    case.checks.append(check)
    quoted = "'" + target + "'"
    case.probe(f"$B cat {quoted}/marker", lambda output, _: output == name.partition(" ")[0])
    case.probe(
        f"$B touch {quoted}/written && $B rm {quoted}/written",
        lambda _, code: (code == 0) is not mount.readonly,
    )


def _host_mounts() -> list[Any]:
    return [mount_of(line) for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def single_file(draw: Draw, case: Case) -> None:
    target = draw(st.sampled_from(("/etc/hosts", "/etc/resolv.conf", "/etc/new/file", "/dev/termination-log", "/one")))
    if target in case.targets:
        return
    case.targets.add(target)
    case.config.mounts.add(container_path=target, host_path=str(case.around.file), readonly=draw(st.booleans()))
    case.probe(f"$B cat {target}", lambda output, _: output == "plain")


def image_mount(draw: Draw, case: Case) -> None:
    if "/image" in case.targets:
        return
    case.targets.add("/image")
    sub_path = draw(st.sampled_from(("", "dir")))
    mount = case.config.mounts.add(container_path="/image", image_sub_path=sub_path, readonly=True)
    mount.image.image = case.around.data_image
    mount.mount_options.extend(draw(st.lists(st.sampled_from(("noexec", "nosuid", "nodev")), unique=True)))
    case.probe("$B cat /image/file", lambda output, _: output == ("below" if sub_path else "top"))
    case.checks.append(lambda seen: contained("ro", seen.view.mount("/image").options, "/image"))
    case.checks.append(
        lambda seen: equal(set(mount.mount_options) - set(seen.view.mount("/image").options), set(), "options")
    )


def devices(draw: Draw, case: Case) -> None:
    for target in draw(st.lists(st.sampled_from(("/dev/fuse", "/dev/a/b", "/dev/né w")), unique=True, min_size=1)):
        source = draw(st.sampled_from(("/dev/fuse", "/dev/loop7", "/dev/loop-control")))
        if target in case.targets:
            continue
        case.targets.add(target)
        permissions = draw(st.sampled_from(("", "r", "w", "rw", "rwm", "mrw")))
        case.config.devices.add(host_path=source, container_path=target, permissions=permissions)
        number = os.stat(source).st_rdev
        expected = f"{os.major(number):x} {os.minor(number):x}"
        case.probe(f"$B stat -c '%t %T' '{target}'", partial(_is, expected))
        for access, command in (("r", f": < '{target}'"), ("w", f": >> '{target}'")):
            case.probe(command, partial(_is_allowed, case, source, access))


def _is_allowed(case: Case, source: str, access: str, output: str, code: int) -> bool:
    """Permissions are those of a device, by whatever path; the file's own come on top for all but root."""
    named = [device for device in case.config.devices if device.host_path == source]
    allowed = case.security.privileged or any(access in (device.permissions or "rwm") for device in named)
    if not allowed:
        return code != 0
    root = case.security.run_as_user.value == 0 and case.security.run_as_username in ("", "root")
    return code == 0 or (not root and "Permission denied" in output)


def cdi(draw: Draw, case: Case) -> None:
    if draw(st.booleans()):
        case.config.CDI_devices.add(name=f"{CDI_KIND}=good")
    else:
        case.config.annotations["cdi.k8s.io/x"] = f"{CDI_KIND}=good"
        case.config.CDI_devices.add(name=f"{CDI_KIND}=good")
    case.variables[b"CDI"] = b"yes"


# -- wishes: resources and the log -------------------------------------------------------------------------------------


def limits(draw: Draw, case: Case) -> None:
    resources = case.resources
    expected: dict[str, Any] = {}
    for name in draw(
        st.lists(st.sampled_from(("memory", "quota", "shares", "cpus", "pids", "oom", "huge")), unique=True)
    ):
        # Each can be said by the field, or in the words of cgroup v2.
        by_knob = draw(st.booleans())
        if name == "memory":
            limit = expected["memory"] = draw(st.sampled_from((64, 100, 4096))) * MIB
            if by_knob:
                resources.unified["memory.max"] = str(limit)
            else:
                resources.memory_limit_in_bytes = limit
                resources.memory_swap_limit_in_bytes = draw(st.sampled_from((0, limit)))
            case.checks.append(partial(_check_swap, limit))
        elif name == "quota":
            period = draw(st.sampled_from((1000, 50000, 100000, 1000000)))
            quota = draw(st.sampled_from((1000, 12345, 100000)))
            # More than there is would be what there is; with hardly any the container would tell us too late.
            if period // 4 <= quota <= period * (os.cpu_count() or 1):
                if by_knob:
                    resources.unified["cpu.max"] = f"{quota} {period}"
                else:
                    resources.cpu_quota, resources.cpu_period = quota, period
                expected["quota_us"], expected["period_us"] = quota, period
        elif name == "shares" and by_knob:
            weight, expected["shares"] = draw(st.sampled_from(((1, 10), (50, 512), (100, 1024), (10000, 102400))))
            resources.unified["cpu.weight"] = str(weight)
        elif name == "shares":
            resources.cpu_shares = expected["shares"] = draw(st.sampled_from((2, 3, 102, 1024, 2047, 262144)))
        elif name == "cpus" and by_knob:
            resources.unified["cpuset.cpus"], expected["cpus"] = "0", "0"
        elif name == "cpus":
            resources.cpuset_cpus, expected["cpus"] = "0", "0"
            resources.cpuset_mems = draw(st.sampled_from(("", "0"))) if _has_one_memory_node() else ""
        elif name == "pids":
            resources.unified["pids.max"] = "50"
            expected["processes"] = 50
        elif name == "oom":
            score = draw(st.sampled_from((1, 500, 1000)))
            resources.oom_score_adj = score
            case.checks.append(partial(_check_oom, score))

        else:
            if by_knob:
                resources.unified["hugetlb.2MB.max"] = "0"
            resources.hugepage_limits.add(page_size="2MB", limit=0)
            resources.hugepage_limits.add(page_size="1GB", limit=0)
            # None is where Porto can't limit them: nobody is given any there.
            case.checks.append(lambda seen: contained(seen.limits.huge_pages, (0, None), "huge pages"))
    if draw(st.booleans()):
        resources.unified["memory.oom.group"] = draw(st.sampled_from(("0", "1")))
    wanted = pb.LinuxContainerResources()
    wanted.CopyFrom(resources)

    def check(seen: Seen) -> None:
        found = dataclasses.asdict(seen.limits)
        equal({name: found[name] for name in expected}, expected, "limits")
        equal(seen.status.resources.linux, wanted, "status.resources")

    case.checks.append(check)


def _has_one_memory_node() -> bool:
    path = Path("/sys/devices/system/node/has_memory")
    return not path.exists() or path.read_text().strip() == "0"


def log(draw: Draw, case: Case) -> None:
    wanted = draw(st.sampled_from(("a.log", "dir/below/b.log", "é ü.log", "x" * 200)))
    case.config.log_path = wanted
    case.checks.append(lambda seen: equal(seen.status.log_path.endswith(f"/{wanted}"), True, seen.status.log_path))


def _is(expected: str, output: str, _code: int) -> bool:
    return output == expected


def _check_swap(limit: int, seen: Seen) -> None:
    contained(seen.limits.memory_and_swap, (limit, None), "memory and swap")


def _check_oom(score: int, seen: Seen) -> None:
    assert seen.view.oom_score_adj == score
