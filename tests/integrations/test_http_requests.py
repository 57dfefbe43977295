"""The governed adapter of requests: a permit from before the request until the response is over."""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
import socket
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import pytest
from model_server import ModelServer
from serving import Gates, idle
from threads import Crew, is_idle, until

from governor import (
    AcquireTimeout,
    ConcurrencyGovernor,
    ConcurrencyLimitExceeded,
    DeadlockError,
    SemaphoreClosed,
)

pytestmark = pytest.mark.every_governor

requests = pytest.importorskip("requests")

from urllib3.response import HTTPResponse  # noqa: E402
from urllib3.util import Retry  # noqa: E402

from governor.integrations.requests import GovernedAdapter  # noqa: E402

ASK = {"model": "scripted", "messages": [{"role": "user", "content": "word " * 500}], "stream": True}


@pytest.fixture
def gov() -> ConcurrencyGovernor:
    return ConcurrencyGovernor(max_streams=1, max_tools=1, max_global=2)


def governed(gov: ConcurrencyGovernor, **options: Any) -> Any:
    session = requests.Session()
    session.mount("http://", GovernedAdapter(gov, **options))
    return session


@pytest.fixture
def session(gov: ConcurrencyGovernor) -> Iterator[Any]:
    with governed(gov) as session:
        yield session


def open_stream(session: Any, server: ModelServer, **options: Any) -> Any:
    return session.post(f"{server.url}/chat/completions", json=ASK, stream=True, **options)


def streams(gov: ConcurrencyGovernor) -> tuple[int, int]:
    stats = gov.stats()
    return stats.streams_in_use, stats.streams_waiting


# --------------------------------------------------------------------------------- held until the end


def test_the_permit_is_held_before_the_server_knows_of_the_request(
    session: Any, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    with Crew() as crew:
        with gov.acquire_stream():
            crew.start(session.get, f"{server.root}/page")
            until(lambda: streams(gov) == (1, 1), "the request in line")
            assert server.pages.peak == 0
        until(lambda: server.pages.now == 1, "the request at the server")
        assert streams(gov) == (1, 0)
        gates.open()
    assert is_idle(gov)


@pytest.mark.usefixtures("switching")
def test_twenty_threads_reach_the_limit_and_do_not_pass_it(server: ModelServer, gates: Gates) -> None:
    gov = ConcurrencyGovernor(max_streams=3, max_tools=1, max_global=4)
    read: list[int] = []

    def ask_twice() -> None:
        for stream in True, False:
            response = session.post(f"{server.url}/chat/completions", json=ASK, stream=stream)
            read.append(len([*response.iter_lines()]))

    with governed(gov, pool_maxsize=20) as session, Crew() as crew:
        for _ in range(20):
            crew.start(ask_twice)
        until(lambda: server.streams.now == 3 and streams(gov) == (3, 17), "three answers, the rest in line")
        gates.open()
    assert len(read) == 40
    assert len(set(read)) == 1
    assert server.streams.peak == 3
    assert is_idle(gov)


def read_all(response: Any) -> None:
    assert response.content.endswith(b"[DONE]\n\n")


def read_chunks(response: Any) -> None:
    assert b"".join(response.iter_content(None)).endswith(b"[DONE]\n\n")


def read_raw(response: Any) -> None:
    assert response.raw.read().endswith(b"[DONE]\n\n")


def copy_raw(response: Any) -> None:
    copied = BytesIO()
    shutil.copyfileobj(response.raw, copied)
    assert copied.getvalue().endswith(b"[DONE]\n\n")


def close(response: Any) -> None:
    response.close()
    response.close()


def close_raw(response: Any) -> None:
    response.raw.close()


def leave_the_block(response: Any) -> None:
    with response:
        pass


def drop_amid_its_lines(response: Any) -> None:
    next(response.iter_lines())


@pytest.mark.parametrize("headers", [{}, {"Connection": "close"}], ids=["chunked", "until it closes"])
@pytest.mark.parametrize(
    "end",
    [read_all, read_chunks, read_raw, copy_raw, close, close_raw, leave_the_block, drop_amid_its_lines],
)
def test_it_is_held_until_the_response_is_over(
    session: Any, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates, headers: Any, end: Any
) -> None:
    gates.open()
    response = open_stream(session, server, headers=headers)
    assert streams(gov) == (1, 0)
    end(response)
    if end is drop_amid_its_lines:
        del response
    assert is_idle(gov)
    until(lambda: idle(server), "the server to notice")


def test_it_is_held_while_lines_are_read(
    session: Any, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    gates.open()
    lines = open_stream(session, server).iter_lines(chunk_size=None)
    assert next(lines).startswith(b"data:")
    assert streams(gov) == (1, 0)
    assert [*lines][-2:] == [b"data: [DONE]", b""]
    assert is_idle(gov)


def test_a_response_that_is_dropped_unread_is_closed_and_gives_it_back(
    session: Any, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    response = open_stream(session, server)
    assert streams(gov) == (1, 0)
    del response
    assert is_idle(gov)
    gates.open()
    until(lambda: server.cut.now == 1, "the server to notice")


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # of its socket, as ever
def test_a_response_in_a_cycle_is_given_back_by_the_collector(
    session: Any, server: ModelServer, gov: ConcurrencyGovernor
) -> None:
    response = open_stream(session, server)
    response.itself = response
    del response
    gc.collect()
    assert is_idle(gov)


def test_a_session_that_is_closed_amid_a_stream_leaves_the_stream_and_its_permit(
    session: Any, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    response = open_stream(session, server)
    session.close()
    assert streams(gov) == (1, 0)  # as the connection goes on, too
    gates.open()
    read_all(response)
    assert is_idle(gov)


# ------------------------------------------------------------------------------------- other endings


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("status", [200, 204, 404, 500])
def test_a_response_of_any_status_gives_it_back(
    session: Any,
    server: ModelServer,
    gov: ConcurrencyGovernor,
    gates: Gates,
    status: int,
    method: str,
    stream: bool,
) -> None:
    gates.open()
    response = session.request(method, f"{server.root}/status/{status}", stream=stream)
    assert response.status_code == status
    has_a_body = method == "GET" and status != 204
    assert streams(gov) == (1 if stream and has_a_body else 0, 0)
    assert bool(response.content) is has_a_body
    assert is_idle(gov)


def test_each_request_of_a_redirect_chain_takes_a_permit_of_its_own(
    session: Any, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    gates.open()
    response = session.get(f"{server.root}/redirect/3")
    assert [it.status_code for it in [*response.history, response]] == [302, 302, 302, 200]
    assert server.pages.peak == 1
    assert is_idle(gov)
    session.max_redirects = 2
    with pytest.raises(requests.TooManyRedirects):
        session.get(f"{server.root}/redirect/9")
    gc.collect()  # the error has the last response
    assert is_idle(gov)


def test_retries_of_the_adapter_are_one_request(
    server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    gates.open()
    retry = Retry(2, status_forcelist=[500], raise_on_status=False)
    with governed(gov, max_retries=retry) as session:
        assert session.get(f"{server.root}/status/500").status_code == 500
        with pytest.raises(requests.exceptions.RetryError):
            session.mount("http://", GovernedAdapter(gov, max_retries=Retry(1, status_forcelist=[500])))
            session.get(f"{server.root}/status/500")
    assert is_idle(gov)


def test_a_refused_connection_gives_it_back(session: Any, gov: ConcurrencyGovernor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        url = f"http://127.0.0.1:{door.getsockname()[1]}"
    with pytest.raises(requests.ConnectionError):
        session.get(url)
    assert is_idle(gov)


def test_a_timeout_of_the_server_gives_it_back(
    session: Any, server: ModelServer, gov: ConcurrencyGovernor
) -> None:
    with pytest.raises(requests.ReadTimeout):
        session.get(f"{server.root}/page", timeout=(5, 0.01))
    assert is_idle(gov)
    with pytest.raises(requests.RequestException, match="timed out"):
        _ = open_stream(session, server, timeout=(5, 0.2)).content
    assert is_idle(gov)


def test_a_request_that_is_interrupted_gives_it_back(
    server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    class Interrupted(GovernedAdapter):
        def build_response(self, request: Any, response: Any) -> Any:
            raise KeyboardInterrupt

    gates.open()
    with requests.Session() as session:
        session.mount("http://", Interrupted(gov))
        with pytest.raises(KeyboardInterrupt):
            session.get(f"{server.root}/page")
    assert is_idle(gov)


def test_what_comes_from_a_cache_keeps_nothing(gov: ConcurrencyGovernor) -> None:
    class Cached(requests.adapters.HTTPAdapter):  # type: ignore[name-defined]
        def send(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            body = HTTPResponse(BytesIO(b"kept"), status=200, preload_content=False)
            return self.build_response(request, body)

    class Governed(GovernedAdapter, Cached):
        pass

    with requests.Session() as session:
        session.mount("http://", Governed(gov))
        response = session.get("http://nowhere/")
        assert response.text == "kept"
        assert is_idle(gov)


def test_a_response_of_another_class_stays_one(
    server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    class Special(HTTPResponse):
        pass

    class Adapter(requests.adapters.HTTPAdapter):  # type: ignore[name-defined]
        def build_response(self, request: Any, response: Any) -> Any:
            response.__class__ = Special
            return super().build_response(request, response)

    class Governed(GovernedAdapter, Adapter):
        pass

    gates.open()
    with requests.Session() as session:
        session.mount("http://", Governed(gov))
        response = open_stream(session, server)
        assert isinstance(response.raw, Special)
        assert streams(gov) == (1, 0)
        read_all(response)
    assert is_idle(gov)


# ----------------------------------------------------------------------------------------- refusals


def test_a_wait_that_times_out_is_a_connect_timeout(server: ModelServer, gov: ConcurrencyGovernor) -> None:
    with governed(gov, acquire_timeout=0.01) as session, gov.acquire_stream():
        with pytest.raises(requests.ConnectTimeout, match="no stream permit within") as caught:
            session.get(f"{server.root}/page")
        assert caught.value.request.url == f"{server.root}/page"
        assert isinstance(caught.value.__cause__, AcquireTimeout)
        assert streams(gov) == (1, 0)
    assert server.pages.peak == 0
    assert is_idle(gov)


def test_other_refusals_are_said_as_they_are(server: ModelServer, gov: ConcurrencyGovernor) -> None:
    with governed(gov) as session, gov.acquire_stream(), pytest.raises(DeadlockError):
        session.get(server.root)
    full = ConcurrencyGovernor(1, 1, 1, max_queued=0)
    with governed(full) as session, full.acquire_stream():
        with pytest.raises(ConcurrencyLimitExceeded):
            session.get(server.root)
        full.close()
        with pytest.raises(SemaphoreClosed):
            session.get(server.root)
    assert is_idle(full)
    assert is_idle(gov)


def test_only_what_is_asked_for_is_governed(
    server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    gates.page.set()
    with governed(gov, kind="tool", when=lambda request: request.method == "POST") as session:
        response = open_stream(session, server)
        assert gov.stats().tools_in_use == 1
        assert session.get(f"{server.root}/page").status_code == 200
        response.close()
    assert is_idle(gov)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ([None], {}, TypeError, "governor must be a ConcurrencyGovernor"),
        ([...], {"kind": "toll"}, ValueError, "kind must be 'stream' or 'tool'"),
        ([...], {"acquire_timeout": -1}, ValueError, "acquire_timeout must be"),
        ([...], {"when": "POST"}, TypeError, "when must be a function"),
        ([...], {"pool_size": 3}, TypeError, "pool_size"),
    ],
)
def test_bad_arguments_are_refused_at_once(
    gov: ConcurrencyGovernor, arguments: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        GovernedAdapter(*[gov if it is ... else it for it in arguments], **options)


# --------------------------------------------------------------------------------- copied and pickled


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_shares_the_governor(
    session: Any, server: ModelServer, gov: ConcurrencyGovernor, copied: Any
) -> None:
    with copied(session) as other, open_stream(other, server):
        assert streams(gov) == (1, 0)
        with pytest.raises(requests.ConnectTimeout):
            governed(gov, acquire_timeout=0).get(server.root)
    assert is_idle(gov)


def test_to_pickle_it_says_what_to_do(session: Any) -> None:
    with pytest.raises(TypeError, match="make one in each process"):
        pickle.dumps(session)


def test_a_response_can_be_pickled_and_gives_it_back(
    session: Any, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    gates.open()
    response = open_stream(session, server)
    assert pickle.loads(pickle.dumps(response)).content.endswith(b"[DONE]\n\n")
    assert is_idle(gov)
