"""Who is let in, and with which protocol."""

from __future__ import annotations

import pytest
from shim_streaming.handshake import CommandProtocol, Gatekeeper, Refused, Request, Upgrade
from shim_streaming.tickets import CommandTicket, ForwardTicket, Ticket, Tickets

EXEC = CommandTicket("exec", "r", "c", ("true",), stdout=True)
FORWARD = ForwardTicket("r", "s", (80,))
KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # of RFC 6455, section 1.3
SPDY = {"host": "127.0.0.1:7255", "connection": "Upgrade", "upgrade": "SPDY/3.1"}
WEBSOCKET = {
    "host": "127.0.0.1:7255",
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": KEY,
}
V4_SPDY = SPDY | {"x-stream-protocol-version": "v4.channel.k8s.io"}


class Door:
    """A gatekeeper and tickets."""

    def __init__(self, prefix: str = "", own_hosts: tuple[str, ...] = ()) -> None:
        self.tickets = Tickets(10, 60)
        self.gatekeeper = Gatekeeper(self.tickets.take, frozenset(own_hosts), prefix)

    def knock(
        self, headers: dict[str, str], ticket: Ticket = EXEC, method: str = "GET", target: str | None = None
    ) -> Upgrade:
        token = self.tickets.issue(ticket)
        return self.gatekeeper.admit(Request(method, target or f"/{ticket.kind}/{token}", headers))

    def refusal(self, headers: dict[str, str], ticket: Ticket = EXEC, method: str = "GET") -> Refused:
        with pytest.raises(Refused) as raised:
            self.knock(headers, ticket, method)
        return raised.value


def protocol(headers: dict[str, str], ticket: Ticket = EXEC) -> str:
    return Door().knock(headers, ticket).protocol.name


# -- protocols ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_spdy(method: str) -> None:
    upgrade = Door().knock(V4_SPDY, method=method)
    assert upgrade.ticket is EXEC
    assert upgrade.protocol == CommandProtocol("v4.channel.k8s.io", 4, websocket=False)
    assert dict(upgrade.headers) == {
        "Connection": "Upgrade",
        "Upgrade": "SPDY/3.1",
        "X-Stream-Protocol-Version": "v4.channel.k8s.io",
    }


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        ("v4.channel.k8s.io,v3.channel.k8s.io", "v4.channel.k8s.io"),
        ("v9.channel.k8s.io, v2.channel.k8s.io ,channel.k8s.io", "v2.channel.k8s.io"),
        ("channel.k8s.io,v4.channel.k8s.io", "channel.k8s.io"),
        (",,v3.channel.k8s.io", "v3.channel.k8s.io"),
    ],
)
def test_the_clients_first_choice_that_is_served_is_taken(offered: str, chosen: str) -> None:
    assert protocol(SPDY | {"x-stream-protocol-version": offered}) == chosen


def test_spdy_protocol_that_is_not_served() -> None:
    refused = Door().refusal(SPDY | {"x-stream-protocol-version": "v5.channel.k8s.io"})
    assert refused.status == 403
    assert ("X-Accepted-Stream-Protocol-Versions", "v4.channel.k8s.io") in refused.headers
    assert len(refused.headers) == 4


@pytest.mark.parametrize("offered", [{}, {"x-stream-protocol-version": " , "}])
def test_spdy_without_a_protocol(offered: dict[str, str]) -> None:
    assert Door().refusal(SPDY | offered).status == 400


def test_spdy_port_forward() -> None:
    assert protocol(SPDY | {"x-stream-protocol-version": "portforward.k8s.io"}, FORWARD) == "portforward.k8s.io"
    assert Door().refusal(V4_SPDY, FORWARD).status == 403


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        ("v5.channel.k8s.io", "v5.channel.k8s.io"),
        ("v4.channel.k8s.io,v5.channel.k8s.io", "v4.channel.k8s.io"),
        ("v4.base64.channel.k8s.io", "v4.base64.channel.k8s.io"),
        ("base64.channel.k8s.io", "base64.channel.k8s.io"),
        ("channel.k8s.io", "channel.k8s.io"),
    ],
)
def test_websocket(offered: str, chosen: str) -> None:
    upgrade = Door().knock(WEBSOCKET | {"sec-websocket-protocol": offered})
    assert dict(upgrade.headers) == {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Accept": "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=",
        "Sec-WebSocket-Protocol": chosen,
    }


def test_websocket_without_a_protocol() -> None:
    upgrade = Door().knock(WEBSOCKET)
    assert upgrade.protocol.name == ""
    assert "Sec-WebSocket-Protocol" not in dict(upgrade.headers)


def test_websocket_port_forward() -> None:
    offered = WEBSOCKET | {"sec-websocket-protocol": "SPDY/3.1+portforward.k8s.io"}
    assert protocol(offered, FORWARD) == "SPDY/3.1+portforward.k8s.io"
    assert protocol(offered, ForwardTicket("r", "s")) == "SPDY/3.1+portforward.k8s.io"
    assert protocol(WEBSOCKET | {"sec-websocket-protocol": "v4.channel.k8s.io"}, FORWARD) == "v4.channel.k8s.io"
    refused = Door().refusal(WEBSOCKET | {"sec-websocket-protocol": "v4.channel.k8s.io"}, ForwardTicket("r", "s"))
    assert refused.status == 400
    assert "ports" in refused.message


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"sec-websocket-version": "8"}, 426),
        ({"sec-websocket-key": "short"}, 400),
        ({"sec-websocket-key": "****"}, 400),
        ({"sec-websocket-protocol": "v9.channel.k8s.io"}, 403),
        ({"upgrade": "h2c"}, 400),
        ({"connection": "close"}, 400),
    ],
)
def test_websockets_that_are_refused(changes: dict[str, str], status: int) -> None:
    assert Door().refusal(WEBSOCKET | changes).status == status


def test_websocket_by_post_is_refused() -> None:
    assert Door().refusal(WEBSOCKET, method="POST").status == 405


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_a_token_is_good_once_and_for_its_kind() -> None:
    door = Door()
    token = door.tickets.issue(EXEC)
    with pytest.raises(Refused, match="no such request"):
        door.knock(V4_SPDY, target=f"/attach/{token}")
    with pytest.raises(Refused, match="no such request"):
        door.knock(V4_SPDY, target=f"/exec/{token}")
    token = door.tickets.issue(EXEC)
    door.knock(V4_SPDY, target=f"/exec/{token}")
    with pytest.raises(Refused, match="no such request") as raised:
        door.knock(V4_SPDY, target=f"/exec/{token}")
    assert raised.value.status == 404
    assert token not in raised.value.message


def test_a_token_that_was_shown_is_used_up_though_nothing_came_of_it() -> None:
    door = Door()
    token = door.tickets.issue(EXEC)
    with pytest.raises(Refused, match="unable to upgrade"):
        door.knock(SPDY | {"x-stream-protocol-version": "v9"}, target=f"/exec/{token}")
    with pytest.raises(Refused, match="no such request"):
        door.knock(V4_SPDY, target=f"/exec/{token}")


@pytest.mark.parametrize(
    "target",
    ["/", "/exec", "/exec/", "/exec/short", "//exec/{}", "/exec/{}/", "/exec/{}/x", "/other/{}", "exec/{}", "*",
     "http://127.0.0.1/exec/{}", "/exec/../exec/{}", "/EXEC/{}"],
)  # fmt: skip
def test_other_paths(target: str) -> None:
    door = Door()
    token = door.tickets.issue(EXEC)
    with pytest.raises(Refused) as raised:
        door.knock(V4_SPDY, target=target.format(token))
    assert raised.value.status == 404
    assert door.tickets.take(token, "exec") is EXEC


def test_a_query_does_not_matter() -> None:
    door = Door()
    door.knock(V4_SPDY, target=f"/exec/{door.tickets.issue(EXEC)}?command=x")


def test_path_prefix_of_the_advertised_url() -> None:
    door = Door(prefix="/cri")
    door.knock(V4_SPDY, target=f"/cri/exec/{door.tickets.issue(EXEC)}")
    door.knock(V4_SPDY, target=f"/exec/{door.tickets.issue(EXEC)}")
    with pytest.raises(Refused):
        door.knock(V4_SPDY, target=f"/crix/exec/{door.tickets.issue(EXEC)}")


@pytest.mark.parametrize("method", ["PUT", "OPTIONS", "HEAD", "CONNECT", "DELETE"])
def test_other_methods(method: str) -> None:
    assert Door().refusal(V4_SPDY, method=method).status == 405


# -- Host and Origin ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:7255", "[::1]:7255", "localhost:7255", "LOCALHOST", "node7"])
def test_own_hosts(host: str) -> None:
    Door(own_hosts=("node7",)).knock(V4_SPDY | {"host": host})


@pytest.mark.parametrize("host", ["attacker.example", "attacker.example:7255", "127.0.0.1.attacker.example", "node8"])
def test_hosts_that_are_not_ours(host: str) -> None:
    door = Door(own_hosts=("node7",))
    assert door.refusal(V4_SPDY | {"host": host}).status == 403
    assert len(door.tickets) == 1  # and the token is still good


@pytest.mark.parametrize("host", ["", "a b", "user@127.0.0.1", "127.0.0.1,attacker.example", "[::1", "x:99999", "h/p"])
def test_broken_hosts(host: str) -> None:
    assert Door().refusal(V4_SPDY | {"host": host}).status == 400


@pytest.mark.parametrize("origin", ["http://attacker.example", "null", "http://127.0.0.1:3000", "http://[", "x"])
def test_pages_of_others_are_refused(origin: str) -> None:
    assert Door().refusal(WEBSOCKET | {"origin": origin}).status == 403


def test_our_own_origin() -> None:
    Door().knock(WEBSOCKET | {"origin": "http://127.0.0.1:7255"})


def test_requests_through_kubelet_carry_their_clients_headers() -> None:
    """kubelet's proxy keeps Host and Origin as they came, and adds X-Forwarded-For."""
    headers = {"host": "worker-3:10250", "origin": "https://console.example.org", "x-forwarded-for": "10.0.0.1"}
    Door().knock(WEBSOCKET | headers)
    Door().knock(V4_SPDY | headers)
