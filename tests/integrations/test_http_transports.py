"""Governed transports of httpx and httpx2: a permit from before the request until the response is over."""

from __future__ import annotations

import asyncio
import gc
import importlib
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from model_server import ModelServer
from serving import Gates, idle
from threads import Crew, is_idle, until

import governor as package
from governor import (
    AcquireTimeout,
    ConcurrencyGovernor,
    ConcurrencyLimitExceeded,
    DeadlockError,
    SemaphoreClosed,
)

pytestmark = pytest.mark.every_governor

ASK = {"model": "scripted", "messages": [{"role": "user", "content": "word " * 500}], "stream": True}


class Library:
    """httpx or httpx2, and what governs it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.its = importlib.import_module(name)
        self.adapter = importlib.import_module(f"governor.integrations.{name}")

    def client(self, server: ModelServer, gov: ConcurrencyGovernor, **options: Any) -> Any:
        transport = self.adapter.GovernedTransport(gov, **options)
        return self.its.Client(transport=transport, base_url=server.root)

    def async_client(self, server: ModelServer, gov: ConcurrencyGovernor, **options: Any) -> Any:
        transport = self.adapter.AsyncGovernedTransport(gov, **options)
        return self.its.AsyncClient(transport=transport, base_url=server.root)


@pytest.fixture(params=["httpx", "httpx2"])
def library(request: pytest.FixtureRequest) -> Library:
    pytest.importorskip(request.param)
    return Library(request.param)


@pytest.fixture
def gov() -> ConcurrencyGovernor:
    return ConcurrencyGovernor(max_streams=1, max_tools=1, max_global=2)


@pytest.fixture
def client(library: Library, server: ModelServer, gov: ConcurrencyGovernor) -> Iterator[Any]:
    with library.client(server, gov) as client:
        yield client


def open_stream(client: Any, **options: Any) -> Any:
    request = client.build_request("POST", "/v1/chat/completions", json=ASK, **options)
    return client.send(request, stream=True)


def streams(gov: ConcurrencyGovernor) -> tuple[int, int]:
    stats = gov.stats()
    return stats.streams_in_use, stats.streams_waiting


# --------------------------------------------------------------------------------- held until the end


def test_the_permit_is_held_before_the_server_knows_of_the_request(
    client: Any, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    gates.page.set()
    with Crew() as crew, gov.acquire_stream():
        crew.start(client.get, "/page")
        until(lambda: streams(gov) == (1, 1), "the request in line")
        assert server.pages.peak == 0
    assert server.pages.peak == 1
    assert is_idle(gov)


def test_it_is_held_until_the_body_is_read_to_its_end(
    client: Any, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    response = open_stream(client)
    until(lambda: server.streams.now == 1, "the answer to begin")
    assert streams(gov) == (1, 0)
    gates.open()
    lines = response.iter_lines()
    assert next(lines).startswith("data:")
    assert streams(gov) == (1, 0)
    for _ in lines:
        pass
    assert is_idle(gov)


def test_it_is_held_until_the_response_is_closed(
    client: Any, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    response = open_stream(client)
    response.close()
    assert is_idle(gov)
    response.close()
    assert is_idle(gov)
    gates.open()
    until(lambda: server.cut.now == 1, "the server to notice")


def test_the_next_request_goes_out_when_the_response_is_closed(
    client: Any, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    gates.page.set()
    with Crew() as crew, client.stream("POST", "/v1/chat/completions", json=ASK):
        crew.start(client.get, "/page")
        until(lambda: streams(gov) == (1, 1), "the second request in line")
        assert server.pages.peak == 0
    assert server.pages.peak == 1
    assert is_idle(gov)
    gates.open()


def test_a_response_without_a_length_ends_with_its_connection(
    client: Any, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    gates.open()
    response = open_stream(client, headers={"Connection": "close"})
    assert response.headers["Connection"] == "close"
    assert streams(gov) == (1, 0)
    assert response.read().endswith(b"[DONE]\n\n")
    assert is_idle(gov)


def test_the_other_kind_may_be_asked_for(
    library: Library, server: ModelServer, gov: ConcurrencyGovernor
) -> None:
    with library.client(server, gov, kind="tool") as client:
        response = open_stream(client)
        assert gov.stats().tools_in_use == 1
        response.close()
    assert is_idle(gov)


def test_what_the_response_tells_of_its_connection_stays(client: Any) -> None:
    with client.stream("POST", "/v1/chat/completions", json=ASK) as response:
        assert response.http_version == "HTTP/1.1"
        assert response.extensions["network_stream"].get_extra_info("server_addr")


def test_the_caller_sees_the_same_body_as_without(
    client: Any, library: Library, server: ModelServer, gates: Gates
) -> None:
    gates.open()
    with library.its.Client(base_url=server.root) as plain:
        assert open_stream(plain).read() == open_stream(client).read()


# ------------------------------------------------------------------------------------- other endings


@pytest.mark.parametrize("status", [204, 404, 500])
def test_a_response_of_any_status_gives_it_back(
    client: Any, gov: ConcurrencyGovernor, gates: Gates, status: int
) -> None:
    gates.open()
    assert client.get(f"/status/{status}").status_code == status
    assert client.head(f"/status/{status}").status_code == status
    assert is_idle(gov)


def test_each_request_of_a_redirect_chain_takes_a_permit_of_its_own(
    client: Any, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    gates.open()
    response = client.get("/redirect/3", follow_redirects=True)
    assert [it.status_code for it in [*response.history, response]] == [302, 302, 302, 200]
    assert server.pages.peak == 1
    assert is_idle(gov)


def test_a_redirect_chain_that_is_too_long_gives_all_back(
    client: Any, library: Library, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    gates.open()
    client.max_redirects = 2
    with pytest.raises(library.its.TooManyRedirects):
        client.get("/redirect/9", follow_redirects=True)
    assert is_idle(gov)


def test_a_refused_connection_gives_it_back(
    library: Library, gov: ConcurrencyGovernor, server: ModelServer
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        url = f"http://127.0.0.1:{door.getsockname()[1]}"
    with library.client(server, gov) as client, pytest.raises(library.its.ConnectError):
        client.get(url)
    assert is_idle(gov)


@pytest.mark.parametrize("stream", [False, True])
def test_a_timeout_of_the_server_gives_it_back(
    client: Any, library: Library, gov: ConcurrencyGovernor, stream: bool
) -> None:
    impatient = library.its.Timeout(5, read=0.01)
    with pytest.raises(library.its.ReadTimeout):
        if stream:
            open_stream(client, timeout=impatient).read()
        else:
            client.get("/page", timeout=impatient)
    assert is_idle(gov)


def test_a_response_that_is_dropped_unread_is_closed_and_then_gives_it_back(
    client: Any, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    response = open_stream(client)
    assert streams(gov) == (1, 0)
    del response
    gc.collect()  # httpx's responses are in a cycle
    until(lambda: is_idle(gov), "the permit to come back")
    gates.open()
    until(lambda: server.cut.now == 1, "the server to notice")


def test_a_response_that_is_dropped_amid_its_lines_gives_it_back(
    client: Any, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    gates.open()
    response = open_stream(client)
    lines = response.iter_lines()
    next(lines)
    assert streams(gov) == (1, 0)
    del response, lines
    gc.collect()
    until(lambda: is_idle(gov), "the permit to come back")
    until(lambda: idle(server), "the server to notice")


def test_a_client_that_is_closed_amid_a_stream_gives_it_back(
    client: Any, library: Library, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    response = open_stream(client)
    client.close()
    assert is_idle(gov)
    gates.open()
    with pytest.raises(library.its.HTTPError):
        response.read()
    assert is_idle(gov)
    until(lambda: server.cut.now == 1, "the server to notice")


def test_a_response_that_a_transport_has_read_already_keeps_nothing(
    library: Library, gov: ConcurrencyGovernor
) -> None:
    inner = library.its.MockTransport(lambda request: library.its.Response(200, text="all of it"))
    with library.its.Client(transport=library.adapter.GovernedTransport(gov, inner)) as client:
        kept = client.get("http://nowhere/")
        assert kept.text == "all of it"
        assert is_idle(gov)


class Broken(OSError):
    pass


def broken_transport(library: Library, closed: list[str], *, fails: str) -> Any:
    """A transport of which one step fails."""

    class Stream(library.its.SyncByteStream):  # type: ignore[name-defined]
        def __iter__(self) -> Iterator[bytes]:
            yield b"some"
            if fails == "read":
                raise Broken

        def close(self) -> None:
            closed.append("stream")
            if fails == "close":
                raise Broken

    class Transport(library.its.BaseTransport):  # type: ignore[name-defined]
        def handle_request(self, request: Any) -> Any:
            if fails == "send":
                raise KeyboardInterrupt
            return library.its.Response(200, stream=Stream())

        def close(self) -> None:
            closed.append("transport")
            if fails == "transport":
                raise Broken

    return Transport()


@pytest.mark.parametrize(
    ("fails", "error"), [("send", KeyboardInterrupt), ("read", Broken), ("close", Broken)]
)
def test_whatever_fails_the_permit_comes_back(
    library: Library, gov: ConcurrencyGovernor, fails: str, error: type[BaseException]
) -> None:
    inner = broken_transport(library, [], fails=fails)
    with library.its.Client(transport=library.adapter.GovernedTransport(gov, inner)) as client:
        with pytest.raises(error):
            client.get("http://nowhere/")
        assert is_idle(gov)


def test_closing_the_client_closes_the_transport_inside_and_gives_all_back_even_if_that_fails(
    library: Library, gov: ConcurrencyGovernor
) -> None:
    closed: list[str] = []
    inner = broken_transport(library, closed, fails="transport")
    transport = library.adapter.GovernedTransport(gov, inner)
    client = library.its.Client(transport=transport)
    response = client.send(client.build_request("GET", "http://nowhere/"), stream=True)
    assert streams(gov) == (1, 0)
    with pytest.raises(Broken):
        client.close()
    assert closed == ["transport"]
    assert is_idle(gov)
    response.close()
    assert closed == ["transport", "stream"]


def test_the_transport_inside_is_entered_and_left_with_the_client(
    library: Library, gov: ConcurrencyGovernor
) -> None:
    closed: list[str] = []
    with library.its.Client(
        transport=library.adapter.GovernedTransport(gov, broken_transport(library, closed, fails=""))
    ):
        assert closed == []
    assert closed == ["transport"]


# ----------------------------------------------------------------------------------------- refusals


def test_a_wait_that_times_out_is_the_clients_own_pool_timeout(
    library: Library, server: ModelServer, gov: ConcurrencyGovernor
) -> None:
    with library.client(server, gov, acquire_timeout=0.01) as client, gov.acquire_stream():
        request = client.build_request("GET", "/page")
        with pytest.raises(library.its.PoolTimeout, match="no stream permit within") as caught:
            client.send(request)
        assert caught.value.request is request
        assert isinstance(caught.value.__cause__, AcquireTimeout)
        assert caught.value.__cause__.bound == 0.01
        assert streams(gov) == (1, 0)
    assert server.pages.peak == 0
    assert is_idle(gov)


def test_a_full_line_and_a_closed_governor_are_said_as_they_are(
    library: Library, server: ModelServer, gates: Gates
) -> None:
    gov = ConcurrencyGovernor(1, 1, 1, max_queued=0)
    with library.client(server, gov) as client, gov.acquire_stream():
        with pytest.raises(ConcurrencyLimitExceeded):
            client.get("/page")
        gov.close()
        with pytest.raises(SemaphoreClosed):
            client.get("/page")
    assert is_idle(gov)


def test_a_request_that_could_never_go_out_says_so(
    library: Library, server: ModelServer, gov: ConcurrencyGovernor
) -> None:
    with library.client(server, gov) as client, gov.acquire_stream(), pytest.raises(DeadlockError):
        client.get("/page")
    assert is_idle(gov)


def test_only_what_is_asked_for_is_governed(
    library: Library, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    gates.page.set()
    with library.client(server, gov, when=lambda request: request.method == "POST") as client:
        response = open_stream(client)
        assert client.get("/page").status_code == 200
        assert streams(gov) == (1, 0)
        response.close()
    assert is_idle(gov)


@pytest.mark.parametrize("name", ["GovernedTransport", "AsyncGovernedTransport"])
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ([None], {}, TypeError, "governor must be a ConcurrencyGovernor"),
        ([..., object()], {}, TypeError, "transport must be an"),
        ([...], {"kind": "toll"}, ValueError, "kind must be 'stream' or 'tool'"),
        ([...], {"acquire_timeout": -1}, ValueError, "acquire_timeout must be"),
        ([...], {"acquire_timeout": "1"}, TypeError, "acquire_timeout must be"),
        ([...], {"when": "POST"}, TypeError, "when must be a function"),
    ],
)
def test_bad_arguments_are_refused_at_once(
    library: Library,
    gov: ConcurrencyGovernor,
    name: str,
    arguments: list[Any],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    given = [gov if it is ... else it for it in arguments]
    with pytest.raises(error, match=message):
        getattr(library.adapter, name)(*given, **options)


@pytest.mark.parametrize("name", ["httpx", "httpx2", "requests"])
def test_without_its_library_an_adapter_names_the_extra(name: str) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(Path(package.__file__).parents[1])!r})
sys.modules[{name!r}] = None
try:
    import governor.integrations.{name}
except ImportError as error:
    assert isinstance(error.__cause__, ImportError)
    print(error)
"""
    said = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert said == f"governor.integrations.{name} needs {name}: pip install 'concurrency-governor[{name}]'\n"


# -------------------------------------------------------------------------------------------- async


Act = Callable[..., Any]


def run(library: Library, server: ModelServer, gov: ConcurrencyGovernor, act: Act, **options: Any) -> None:
    async def main() -> None:
        async with library.async_client(server, gov, **options) as client:
            await act(client)

    asyncio.run(main())


async def open_async(client: Any, asked: dict[str, Any] = ASK, **options: Any) -> Any:
    request = client.build_request("POST", "/v1/chat/completions", json=asked, **options)
    return await client.send(request, stream=True)


async def until_async(condition: Callable[[], object]) -> None:
    """Let others run until it is so; pytest-timeout has the last word."""
    while not condition():
        await asyncio.sleep(0.001)


async def cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_async_it_is_held_until_the_body_is_read_to_its_end(
    library: Library, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    async def act(client: Any) -> None:
        response = await open_async(client)
        assert streams(gov) == (1, 0)
        gates.open()
        lines = [line async for line in response.aiter_lines()]
        assert lines[-2:] == ["data: [DONE]", ""]
        assert is_idle(gov)

    run(library, server, gov, act)


def test_async_it_is_held_until_the_response_is_closed(
    library: Library, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    async def act(client: Any) -> None:
        response = await open_async(client)
        assert streams(gov) == (1, 0)
        await response.aclose()
        assert is_idle(gov)
        await response.aclose()

    run(library, server, gov, act)
    gates.open()
    until(lambda: server.cut.now == 1, "the server to notice")
    assert is_idle(gov)


def test_async_the_loop_runs_while_a_request_waits(
    library: Library, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    gates.open()

    async def act(client: Any) -> None:
        with gov.acquire_stream():
            task = asyncio.create_task(client.get("/page"))
            await until_async(lambda: streams(gov) == (1, 1))
            assert server.pages.peak == 0
        assert (await task).status_code == 200

    run(library, server, gov, act)
    assert is_idle(gov)


def test_async_a_request_that_is_cancelled_in_line_leaves_it(
    library: Library, server: ModelServer, gov: ConcurrencyGovernor
) -> None:
    async def act(client: Any) -> None:
        with gov.acquire_stream():
            task = asyncio.create_task(client.get("/page"))
            await until_async(lambda: streams(gov) == (1, 1))
            await cancelled(task)
            assert streams(gov) == (1, 0)
        assert is_idle(gov)

    run(library, server, gov, act)
    assert server.pages.peak == 0


def test_async_a_request_that_is_cancelled_as_its_permit_comes_gives_it_back(
    library: Library, server: ModelServer, gov: ConcurrencyGovernor
) -> None:
    async def act(client: Any) -> None:
        with gov.acquire_stream():
            task = asyncio.create_task(client.get("/page"))
            await until_async(lambda: streams(gov) == (1, 1))
        assert streams(gov) == (1, 0)  # granted, and the task does not know yet
        await cancelled(task)
        assert is_idle(gov)

    run(library, server, gov, act)
    assert server.pages.peak == 0


def test_async_a_request_that_is_cancelled_while_it_is_answered_gives_it_back(
    library: Library, server: ModelServer, gov: ConcurrencyGovernor
) -> None:
    async def act(client: Any) -> None:
        task = asyncio.create_task(client.get("/page"))
        await until_async(lambda: server.pages.now == 1)
        await cancelled(task)
        assert is_idle(gov)

    run(library, server, gov, act)


def test_async_a_stream_that_is_cancelled_while_it_is_read_gives_it_back(
    library: Library, server: ModelServer, gov: ConcurrencyGovernor
) -> None:
    async def act(client: Any) -> None:
        response = await open_async(client)
        task = asyncio.create_task(response.aread())
        await asyncio.sleep(0)
        await cancelled(task)
        await response.aclose()
        assert is_idle(gov)

    run(library, server, gov, act)


def test_async_a_wait_that_times_out_is_the_clients_own_pool_timeout(
    library: Library, server: ModelServer, gov: ConcurrencyGovernor
) -> None:
    async def act(client: Any) -> None:
        request = client.build_request("GET", "/page")
        with gov.acquire_stream():
            with pytest.raises(library.its.PoolTimeout) as caught:
                await client.send(request)
            assert streams(gov) == (1, 0)
        assert caught.value.request is request
        assert isinstance(caught.value.__cause__, AcquireTimeout)
        assert str(caught.value) == (
            "no stream permit within 0.01 s: streams 1/1 in use, global 1/2, 0 waiting ahead"
        )

    run(library, server, gov, act, acquire_timeout=0.01)
    assert server.pages.peak == 0


def test_async_a_timeout_of_0_is_enough_where_there_is_room(
    library: Library, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    gates.open()

    async def act(client: Any) -> None:
        assert (await client.get("/page")).status_code == 200
        with gov.acquire_stream(), pytest.raises(library.its.PoolTimeout, match="at once"):
            await client.get("/page")

    run(library, server, gov, act, acquire_timeout=0)
    assert is_idle(gov)


def test_async_a_full_line_and_a_closed_governor_are_said_as_they_are(
    library: Library, server: ModelServer
) -> None:
    gov = ConcurrencyGovernor(1, 1, 1, max_queued=1)

    async def act(client: Any) -> None:
        with gov.acquire_stream():
            task = asyncio.create_task(client.get("/page"))
            await until_async(lambda: streams(gov) == (1, 1))
            with pytest.raises(ConcurrencyLimitExceeded):
                await client.get("/page")
            gov.close()
            with pytest.raises(SemaphoreClosed):
                await task

    run(library, server, gov, act)
    assert is_idle(gov)


def test_async_only_what_is_asked_for_is_governed(
    library: Library, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    gates.page.set()

    async def act(client: Any) -> None:
        with gov.acquire_stream():
            assert (await client.get("/page")).status_code == 200

    run(library, server, gov, act, when=lambda request: request.url.path != "/page")
    assert is_idle(gov)


def test_async_every_other_ending_gives_it_back(
    library: Library, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        url = f"http://127.0.0.1:{door.getsockname()[1]}"

    async def act(client: Any) -> None:
        impatient = library.its.Timeout(5, read=0.01)
        with pytest.raises(library.its.ReadTimeout):
            await client.get("/page", timeout=impatient)
        assert is_idle(gov)
        gates.open()
        with pytest.raises(library.its.ConnectError):
            await client.get(url)
        assert is_idle(gov)
        for status in 204, 404, 500:
            assert (await client.get(f"/status/{status}")).status_code == status
            assert is_idle(gov)
        response = await client.get("/redirect/3", follow_redirects=True)
        assert len(response.history) == 3
        assert is_idle(gov)
        response = await open_async(client, headers={"Connection": "close"})
        assert (await response.aread()).endswith(b"[DONE]\n\n")
        assert is_idle(gov)

    run(library, server, gov, act)


def test_async_a_response_that_is_dropped_unread_gives_it_back_and_is_closed(
    library: Library, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    # More than any buffer takes, so that the server must notice when the connection is closed.
    much = ASK | {"messages": [{"role": "user", "content": "word " * 100_000}]}

    async def act(client: Any) -> None:
        response = await open_async(client, much)
        assert streams(gov) == (1, 0)
        del response
        gc.collect()
        assert is_idle(gov)
        gates.open()
        await until_async(lambda: server.cut.now == 1)

    run(library, server, gov, act)


def test_async_a_response_that_outlives_its_loop_gives_it_back_when_dropped(
    library: Library, server: ModelServer, gov: ConcurrencyGovernor
) -> None:
    async def main() -> Any:
        inner = streaming_transport(library)
        client = library.its.AsyncClient(transport=library.adapter.AsyncGovernedTransport(gov, inner))
        return await client.send(client.build_request("GET", "http://nowhere/"), stream=True)

    response = asyncio.run(main())
    assert streams(gov) == (1, 0)
    del response
    gc.collect()
    assert is_idle(gov)


def streaming_transport(library: Library, error: BaseException | None = None) -> Any:
    class Stream(library.its.AsyncByteStream):  # type: ignore[name-defined]
        async def __aiter__(self) -> Any:
            yield b"some"

        async def aclose(self) -> None:
            if error is not None:
                raise error

    class Transport(library.its.AsyncBaseTransport):  # type: ignore[name-defined]
        async def handle_async_request(self, request: Any) -> Any:
            return library.its.Response(200, stream=Stream())

    return Transport()


def test_async_a_stream_that_cannot_be_closed_gives_it_back(
    library: Library, gov: ConcurrencyGovernor
) -> None:
    async def main() -> None:
        transport = library.adapter.AsyncGovernedTransport(gov, streaming_transport(library, Broken()))
        async with library.its.AsyncClient(transport=transport) as client:
            with pytest.raises(Broken):
                await client.get("http://nowhere/")
        assert is_idle(gov)

    asyncio.run(main())


def test_async_a_client_that_is_closed_amid_a_stream_gives_it_back(
    library: Library, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    async def act(client: Any) -> None:
        response = await open_async(client)
        await client.aclose()
        assert is_idle(gov)
        gates.open()
        with pytest.raises(library.its.HTTPError):
            await response.aread()
        await until_async(lambda: server.cut.now == 1)

    asyncio.run(act(library.async_client(server, gov)))
    assert is_idle(gov)


def test_async_without_a_loop_of_asyncio_nothing_is_taken(
    library: Library, server: ModelServer, gov: ConcurrencyGovernor
) -> None:
    transport = library.adapter.AsyncGovernedTransport(gov)
    sending = transport.handle_async_request(library.its.Request("GET", server.root))
    with pytest.raises(RuntimeError, match="no running event loop"):
        sending.send(None)
    assert is_idle(gov)


# --------------------------------------------------------------------------------- threads and tasks


@pytest.mark.usefixtures("switching")
def test_threads_and_tasks_stand_in_one_line_and_pass_no_limit(
    library: Library, server: ModelServer, gates: Gates
) -> None:
    gov = ConcurrencyGovernor(max_streams=3, max_tools=1, max_global=4)
    read: list[int] = []

    def in_a_thread(client: Any) -> None:
        with client.stream("POST", "/v1/chat/completions", json=ASK) as response:
            read.append(len([*response.iter_lines()]))

    async def in_tasks() -> None:
        async def task(client: Any) -> None:
            async with client.stream("POST", "/v1/chat/completions", json=ASK) as response:
                read.append(len([line async for line in response.aiter_lines()]))

        async with library.async_client(server, gov) as client:
            await asyncio.gather(*(task(client) for _ in range(8)))

    with library.client(server, gov) as client, Crew() as crew:
        for _ in range(8):
            crew.start(in_a_thread, client)
        crew.start(asyncio.run, in_tasks())
        until(lambda: server.streams.now == 3 and streams(gov) == (3, 13), "three answers, the rest in line")
        gates.open()
    assert len(read) == 16
    assert len(set(read)) == 1
    assert server.streams.peak == 3
    assert is_idle(gov)


def test_a_stream_that_another_thread_drops_gives_it_back(
    client: Any, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    opened = [open_stream(client)]
    with Crew() as crew:
        crew.start(opened.clear)
    gc.collect()
    until(lambda: is_idle(gov), "the permit to come back")
    gates.open()
    until(lambda: idle(server), "the server to notice")
