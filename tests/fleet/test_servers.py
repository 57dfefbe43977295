"""What the tests of fleets stand on: a real server that can be ended, and a proxy that loses things."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fleet.servers import Proxy, Server, redis
from threads import Crew, until

pytestmark = pytest.mark.timeout(30)

ONE = "return redis.call('INCR', KEYS[1])"


@contextmanager
def once(url: str, **options: Any) -> Iterator[Any]:
    """A client that tries once, and waits five seconds."""
    with redis.Redis.from_url(url, retry=None, **{"socket_timeout": 5, **options}) as client:
        yield client


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_a_server_answers_until_it_is_stopped(unix: bool) -> None:
    with Server(unix=unix, maxmemory="32mb") as server, once(server.url) as client:
        assert client.set("key", 1)
        assert client.config_get("maxmemory") == {"maxmemory": str(32 << 20)}
        server.stop()
        with pytest.raises(redis.ConnectionError):
            client.get("key")


@pytest.mark.parametrize("durable", [True, False])
def test_a_durable_server_keeps_its_data_when_it_is_killed(durable: bool) -> None:
    with Server(durable=durable) as server:
        with once(server.url) as client:
            client.set("key", 1)
        server.restart(data=durable)
        with once(server.url) as client:
            assert client.exists("key") == durable
        server.restart(data=False)
        with once(server.url) as client:
            assert not client.exists("key")


def test_a_replica_follows_until_it_is_promoted() -> None:
    with Server() as primary, Server(replica_of=primary) as replica:
        client, other = primary.client(), replica.client()
        client.set("key", 1)
        until(lambda: other.get("key") == "1", "the key at the replica")
        with pytest.raises(redis.exceptions.ReadOnlyError):
            other.set("key", 2)
        primary.kill()
        other.replicaof("NO", "ONE")
        assert other.set("key", 2)


def test_servers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    script = (
        "import os, pathlib, time\n"
        "from fleet.servers import Server\n"
        "server = Server().start()\n"
        f"pathlib.Path({str(note)!r}).write_text(str(server._process.pid))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    env = {**os.environ, "PYTHONPATH": paths, "TMPDIR": str(tmp_path)}  # nobody deletes its files
    done = subprocess.run([sys.executable, "-c", script], env=env, timeout=20)
    assert done.returncode == -signal.SIGKILL
    pid = int(note.read_text())

    def gone() -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        # Whose parent does not collect it stays as a zombie; it runs no more.
        stat = Path(f"/proc/{pid}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"

    until(gone, "the end of the server")


def test_a_proxy_relays_and_cuts(server: Server, proxy: Proxy, fleet_name: str) -> None:
    with once(proxy.url) as client:
        assert client.incr(fleet_name) == 1
        assert proxy.connections == 1
        with Crew() as crew, once(server.url) as direct:
            crew.start(lost, client, f"{fleet_name}-list")
            until(lambda: direct.info("clients")["blocked_clients"] == 1, "one that waits for an answer")
            proxy.cut()
        assert client.incr(fleet_name) == 2
        proxy.refusing = True
        proxy.cut()
        for _ in range(2):
            with pytest.raises(redis.ConnectionError):
                client.incr(fleet_name)
        proxy.restore()
        assert client.incr(fleet_name) == 3
        client.delete(fleet_name)


def lost(client: Any, name: str) -> None:
    with pytest.raises(redis.ConnectionError):
        client.blpop([name], 10)


@pytest.mark.parametrize("direction", ["to_server", "to_client"])
def test_a_proxy_loses_one_direction(server: Server, proxy: Proxy, fleet_name: str, direction: str) -> None:
    with once(proxy.url, socket_timeout=0.2) as client, once(server.url) as direct:
        client.incr(fleet_name)
        proxy.lose(**{direction: True})
        with pytest.raises(redis.TimeoutError):
            client.incr(fleet_name)
        assert int(direct.get(fleet_name)) == (1 if direction == "to_server" else 2)
        proxy.restore()
        client.incr(fleet_name)
        client.delete(fleet_name)


def test_a_proxy_holds_answers_back(server: Server, proxy: Proxy, fleet_name: str) -> None:
    with once(proxy.url) as client, once(server.url) as direct, Crew() as crew:
        client.set(fleet_name, 0)
        proxy.hold_back()
        thread = crew.start(client.incr, fleet_name)
        until(lambda: direct.get(fleet_name) == b"1", "what it has asked for")
        assert thread.is_alive()
        proxy.restore()
        thread.join(5)
        assert client.incr(fleet_name) == 2
        client.delete(fleet_name)


@pytest.mark.parametrize("silently", [False, True])
def test_a_proxy_loses_the_answer_of_a_script_that_was_carried_out(
    server: Server, proxy: Proxy, fleet_name: str, silently: bool
) -> None:
    with once(proxy.url, socket_timeout=0.5) as client, once(server.url) as direct:
        sha = client.script_load(ONE)
        assert client.evalsha(sha, 1, fleet_name) == 1
        proxy.lose_answers(silently=silently)
        with pytest.raises(redis.exceptions.NoScriptError):  # nothing was carried out, so it does not count
            client.evalsha("0" * 40, 1, fleet_name)
        assert client.get(fleet_name) == b"1"
        with pytest.raises(redis.TimeoutError if silently else redis.ConnectionError):
            client.evalsha(sha, 1, fleet_name)
        assert proxy.lost_answers == 1
        assert direct.get(fleet_name) == b"2"
        assert client.evalsha(sha, 1, fleet_name) == 3
        client.delete(fleet_name)


@pytest.mark.parametrize("protocol", [2, 3])
def test_a_proxy_loses_messages_and_nothing_else(
    server: Server, proxy: Proxy, fleet_name: str, protocol: int
) -> None:
    with once(proxy.url, protocol=protocol) as client, client.pubsub() as channel, once(server.url) as direct:
        channel.subscribe(fleet_name)
        assert channel.get_message(timeout=5)["type"] == "subscribe"
        proxy.lose_messages()
        assert direct.publish(fleet_name, "lost") == 1
        until(lambda: proxy.lost_messages == 1, "the loss")
        channel.ping()
        assert channel.get_message(timeout=5)["type"] == "pong"
        proxy.restore()
        direct.publish(fleet_name, "come")
        assert channel.get_message(timeout=5)["data"] == b"come"


def test_a_proxy_leads_elsewhere(server: Server, proxy: Proxy) -> None:
    with Server() as other, once(proxy.url) as client:
        first = client.info("server")["tcp_port"]
        proxy.target = other.address
        assert client.info("server")["tcp_port"] == first  # connections stay as they are
        proxy.cut()
        assert (first, client.info("server")["tcp_port"]) == (server.port, other.port)
