"""Which of the kernel's settings a container may have values of its own for."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from shim_embedded_porto.text import words

_NETWORK = {
    "net.core.": words("somaxconn"),
    "net.ipv4.": words(
        "fib_multipath_hash_policy fib_multipath_use_neigh icmp_echo_ignore_all icmp_echo_ignore_broadcasts "
        "icmp_errors_use_inbound_ifaddr icmp_ignore_bogus_error_responses icmp_ratelimit icmp_ratemask "
        "ip_default_ttl ip_dynaddr ip_early_demux ip_forward_update_priority ip_forward_use_pmtu "
        "ip_local_port_range ip_local_reserved_ports ip_no_pmtu_disc ip_nonlocal_bind "
        "ip_unprivileged_port_start ping_group_range tcp_abort_on_overflow tcp_adv_win_scale tcp_app_win "
        "tcp_autocorking tcp_base_mss tcp_challenge_ack_limit tcp_comp_sack_delay_ns tcp_comp_sack_nr "
        "tcp_dsack tcp_early_demux tcp_early_retrans tcp_ecn tcp_ecn_fallback tcp_fack tcp_fastopen "
        "tcp_fastopen_blackhole_timeout_sec tcp_fastopen_key tcp_fin_timeout tcp_frto tcp_fwmark_accept "
        "tcp_invalid_ratelimit tcp_keepalive_intvl tcp_keepalive_probes tcp_keepalive_time tcp_l3mdev_accept "
        "tcp_limit_output_bytes tcp_max_reordering tcp_max_syn_backlog tcp_max_tw_buckets tcp_min_rtt_wlen "
        "tcp_min_tso_segs tcp_moderate_rcvbuf tcp_mtu_probing tcp_no_metrics_save tcp_notsent_lowat "
        "tcp_orphan_retries tcp_pacing_ca_ratio tcp_pacing_ss_ratio tcp_probe_interval tcp_probe_threshold "
        "tcp_recovery tcp_reordering tcp_retrans_collapse tcp_retries1 tcp_retries2 tcp_rfc1337 tcp_rmem "
        "tcp_sack tcp_slow_start_after_idle tcp_stdurg tcp_syn_retries tcp_synack_retries tcp_syncookies "
        "tcp_thin_linear_timeouts tcp_timestamps tcp_tso_win_divisor tcp_tw_reuse tcp_window_scaling tcp_wmem "
        "tcp_workaround_signed_windows udp_early_demux udp_l3mdev_accept udp_rmem_min udp_wmem_min"
    ),
    "net.ipv6.": words(
        "bindv6only fib_multipath_hash_policy flowlabel_reflect ip_nonlocal_bind max_dst_opts_length "
        "max_dst_opts_number max_hbh_length max_hbh_opts_number seg6_flowlabel"
    ),
    "net.ipv6.icmp.": words("echo_ignore_all ratelimit ratemask"),
    "net.ipv6.route.": words(
        "gc_elasticity gc_interval gc_min_interval gc_min_interval_ms gc_thresh gc_timeout max_size "
        "min_adv_mss mtu_expires"
    ),
    "net.unix.": words("max_dgram_qlen"),
}
"""Those a network namespace has of its own."""

_NETWORK_PREFIXES = ("net.ipv4.conf.", "net.ipv6.conf.", "net.ipv4.neigh.", "net.ipv6.neigh.")
_NOT_BY_NAMESPACE = ("net.ipv4.neigh.default.", "net.ipv6.neigh.default.")
IPC = (
    *("fs.mqueue.queues_max", "fs.mqueue.msg_max", "fs.mqueue.msgsize_max"),
    *("fs.mqueue.msg_default", "fs.mqueue.msgsize_default"),
    *("kernel.shmmax", "kernel.shmall", "kernel.shmmni", "kernel.shm_rmid_forced"),
    *("kernel.msgmax", "kernel.msgmni", "kernel.msgmnb", "kernel.sem"),
)
"""Those of an IPC namespace."""


def of_network(name: str) -> bool:
    """True for what a network namespace has of its own."""
    head, _, tail = name.rpartition(".")
    if tail in _NETWORK.get(f"{head}.", ()):
        return True
    return name.startswith(_NETWORK_PREFIXES) and not name.startswith(_NOT_BY_NAMESPACE) and not is_unsafe(name)


def is_unsafe(name: str) -> bool:
    """True for a name that leads elsewhere when it is taken for a path."""
    return "/" in name or ".." in name


@lru_cache(maxsize=1)
def ipc_defaults() -> tuple[tuple[str, str], ...]:
    """The machine's own values, with which an IPC namespace begins."""
    found = []
    for name in IPC:
        try:
            found.append((name, Path("/proc/sys", name.replace(".", os.sep)).read_text().strip()))
        except OSError:
            continue
    return tuple(found)
