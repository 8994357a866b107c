"""The node's pod CIDR, as kubelet tells it: remembered, and rendered into a network configuration if one is wanted."""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import threading
from pathlib import Path

from shim_cni_net import gotemplate, netconf
from shim_core.errors import FailedPrecondition, InvalidArgument, Unavailable

logger = logging.getLogger("shim.cni_net")

CONFIG_NAME = "10-portoshim-net.conflist"
"""The file in ConfDir that a template is rendered into."""

_MAX_CIDRS = 16
_MAX_TEMPLATE_BYTES = 256 * 1024


class PodCidr:
    """What kubelet has said. It says it once, so it is kept across restarts of the daemon.

    :param state_dir: where it is kept.   :param conf_dir: where configurations belong.
    :param template: path of a template, or empty.
    """

    def __init__(self, state_dir: str, conf_dir: str, template: str) -> None:
        self._path = Path(state_dir, "pod-cidr.json")
        self._conf_dir = Path(conf_dir)
        self._template = template
        self._cidrs: tuple[str, ...] = ()
        self._lock = threading.Lock()

    def open(self) -> None:
        """Read what was said to an earlier run, and render it if the template has changed since."""
        try:
            with self._lock:
                self._cidrs = parse(",".join(json.loads(self._path.read_bytes())["podCidrs"]))
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError, InvalidArgument) as err:
            logger.warning("%s can't be read; kubelet has to tell the pod CIDR again: %s", self._path, err)
            return
        try:
            self._render()
        except (FailedPrecondition, Unavailable) as err:
            logger.error("%s", err)

    def cidrs(self) -> tuple[str, ...]:
        """The pod CIDRs; none before kubelet has told them."""
        with self._lock:
            return self._cidrs

    def update(self, text: str) -> None:
        """Take what kubelet says: CIDRs separated by commas. Nothing is no news.

        :raises InvalidArgument: one is no CIDR.
        :raises FailedPrecondition: the template can't be rendered.   :raises Unavailable: a file can't be written.
        """
        if not text.strip():
            return
        cidrs = parse(text)
        with self._lock:
            self._cidrs = cidrs
            self._write(self._path, json.dumps({"podCidrs": cidrs}).encode(), mode=0o600)
        self._render()

    def _render(self) -> None:
        """Write the configuration, unless the node has another: then somebody else looks after the network."""
        if not self._template:
            return
        target = self._conf_dir / CONFIG_NAME
        with self._lock:
            others = [name for name in _listdir(self._conf_dir) if name.endswith(netconf.EXTENSIONS)]
            if others and CONFIG_NAME not in others:
                logger.info("%s holds %s: ConfTemplate is not rendered", self._conf_dir, ", ".join(sorted(others)))
                return
            data = self._rendered().encode()
            try:
                if target.read_bytes() == data:
                    return
            except OSError:
                pass
            try:
                self._conf_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
            except OSError as err:
                raise Unavailable(f"{self._conf_dir} can't be made: {err.strerror}") from None
            self._write(target, data, mode=0o644)
        logger.info("%s is written for the pod CIDR %s", target, ", ".join(self._cidrs))

    def _rendered(self) -> str:
        families = {ipaddress.ip_network(cidr).version for cidr in self._cidrs}
        values: dict[str, gotemplate.Value] = {
            "PodCIDR": self._cidrs[0],
            "PodCIDRRanges": self._cidrs,
            "Routes": [route for family, route in ((4, "0.0.0.0/0"), (6, "::/0")) if family in families],
        }
        try:
            with open(self._template, encoding="utf-8") as file:
                template = file.read(_MAX_TEMPLATE_BYTES + 1)
            if len(template) > _MAX_TEMPLATE_BYTES:
                raise ValueError(f"larger than {_MAX_TEMPLATE_BYTES} bytes")
            text = gotemplate.render(template, values)
            netconf.parse_list(netconf.parse_json(text.encode(), "what it renders to"), "what it renders to")
        except OSError as err:
            raise FailedPrecondition(f"CNI.ConfTemplate: {self._template} can't be read: {err.strerror}") from None
        except (ValueError, gotemplate.TemplateError, netconf.NetworkConfigError) as err:
            raise FailedPrecondition(f"CNI.ConfTemplate: {self._template}: {err}") from None
        return text

    @staticmethod
    def _write(path: Path, data: bytes, *, mode: int) -> None:
        """Replace a file as a whole; plugins and readers never see a part of it."""
        # Not an extension of configurations: nobody may take it for one.
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
            with open(fd, "wb") as file:
                os.fchmod(fd, mode)
                file.write(data)
                file.flush()
                os.fsync(fd)
            os.rename(temporary, path)
        except OSError as err:
            temporary.unlink(missing_ok=True)
            raise Unavailable(f"{path} can't be written: {err.strerror}") from None


def parse(text: str) -> tuple[str, ...]:
    """CIDRs separated by commas, without doubles.

    :raises InvalidArgument: one is none.
    """
    cidrs = []
    for item in text.split(","):
        try:
            cidrs.append(str(ipaddress.ip_network(item.strip(), strict=False)))
        except ValueError:
            raise InvalidArgument(f"network_config.pod_cidr: {item.strip()[:64]!r} is not a CIDR") from None
    if len(cidrs) > _MAX_CIDRS:
        raise InvalidArgument(f"network_config.pod_cidr: more than {_MAX_CIDRS} CIDRs")
    return tuple(dict.fromkeys(cidrs))


def _listdir(path: Path) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []
