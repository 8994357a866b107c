"""The profile behind ``RuntimeDefault``: every system call that was known when this package was built, except these.

What is newer than that fails with ENOSYS, so that programs fall back to older calls. Each call below needs the
capability it stands under, or none gives it back (``NEVER``).
"""

from __future__ import annotations

from collections.abc import Collection

from shim_porto_runtime.seccomp.bpf import syscalls
from shim_porto_runtime.seccomp.profile import ALLOW, Condition, Profile, Rule, errno_action

_EPERM, _ENOSYS = 1, 38

NEVER = frozenset(
    {
        # keyrings are not namespaced
        "add_key", "keyctl", "request_key",
        # io_uring carries out calls past any filter
        "io_uring_enter", "io_uring_register", "io_uring_setup",
        # faults handled in user space help to win races in the kernel
        "userfaultfd",
        # the root directory is the runtime's business
        "pivot_root",
        # old, unused, and each with a history
        "_sysctl", "create_module", "get_kernel_syms", "nfsservctl", "query_module", "sysfs", "uselib", "ustat",
        "vm86", "vm86old",
    }
)  # fmt: skip

BY_CAPABILITY: dict[str, frozenset[str]] = {
    "SYS_ADMIN": frozenset(
        {
            "fanotify_init", "fsconfig", "fsmount", "fsopen", "fspick", "lookup_dcookie", "mount", "mount_setattr",
            "move_mount", "open_tree", "quotactl", "quotactl_fd", "setdomainname", "sethostname", "setns", "swapoff",
            "swapon", "umount", "umount2", "unshare",
        }
    ),
    "BPF": frozenset({"bpf"}),
    "PERFMON": frozenset({"perf_event_open"}),
    "DAC_READ_SEARCH": frozenset({"open_by_handle_at"}),
    "SYS_BOOT": frozenset({"kexec_file_load", "kexec_load", "reboot"}),
    "SYS_CHROOT": frozenset({"chroot"}),
    "SYS_MODULE": frozenset({"delete_module", "finit_module", "init_module"}),
    "SYS_NICE": frozenset(
        {"get_mempolicy", "mbind", "migrate_pages", "move_pages", "set_mempolicy", "set_mempolicy_home_node"}
    ),
    "SYS_PACCT": frozenset({"acct"}),
    "SYS_PTRACE": frozenset(
        {"kcmp", "pidfd_getfd", "process_madvise", "process_vm_readv", "process_vm_writev"}
    ),
    "SYS_RAWIO": frozenset({"ioperm", "iopl"}),
    "SYS_TIME": frozenset({"clock_settime", "clock_settime64", "settimeofday", "stime"}),
    "SYS_TTY_CONFIG": frozenset({"vhangup"}),
    "SYSLOG": frozenset({"syslog"}),
}  # fmt: skip
"""Calls that a capability gives back. SYS_ADMIN, as in the kernel, stands for BPF, PERFMON and SYSLOG as well."""

_NAMESPACE_FLAGS = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_AF_VSOCK = 40
# What programs built for other personalities ask for: Linux, plain, with short inode numbers or without randomisation.
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)


def default_profile(capabilities: Collection[str]) -> Profile:
    """The default profile for a container with these capabilities (names without ``CAP_``)."""
    known = set().union(*syscalls().values())
    admin = "SYS_ADMIN" in capabilities
    denied = set(NEVER)
    for capability, calls in BY_CAPABILITY.items():
        implied = admin and capability in ("BPF", "PERFMON", "SYSLOG")
        if capability not in capabilities and not implied:
            denied |= calls
    conditional: list[Rule] = []
    if not admin:
        # clone3 hides its flags behind a pointer, which no filter can follow: programs fall back to clone.
        conditional += [
            Rule(("clone",), ALLOW, (Condition(0, "SCMP_CMP_MASKED_EQ", _NAMESPACE_FLAGS, 0),)),
            Rule(("clone",), errno_action(_EPERM)),
            Rule(("clone3",), errno_action(_ENOSYS)),
        ]
    conditional += [Rule(("personality",), ALLOW, (Condition(0, "SCMP_CMP_EQ", value),)) for value in _PERSONALITIES]
    conditional += [
        Rule(("personality",), errno_action(_EPERM)),
        # A virtual machine's sockets reach its host past every network policy.
        Rule(("socket",), ALLOW, (Condition(0, "SCMP_CMP_NE", _AF_VSOCK),)),
        Rule(("socket",), errno_action(_EPERM)),
    ]
    special = {name for rule in conditional for name in rule.names}
    return Profile(
        default_action=errno_action(_EPERM),
        rules=(*conditional, Rule(tuple(sorted(known - denied - special)), ALLOW)),
        unknown_action=errno_action(_ENOSYS),
    )
