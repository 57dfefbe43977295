"""OpenAI's and Anthropic's clients under governed transports, held to their limits as the server counts."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Callable
from typing import Any

import pytest
from model_server import ModelServer
from serving import Gates, idle
from threads import Crew, is_idle, until

from governor import AcquireTimeout, ConcurrencyGovernor, ConcurrencyLimitExceeded, SemaphoreClosed

anthropic = pytest.importorskip("anthropic")
openai = pytest.importorskip("openai")
httpx2 = pytest.importorskip("httpx2")

from governor.integrations.httpx2 import AsyncGovernedTransport, GovernedTransport  # noqa: E402

ANSWER = "You said: good day"


class OpenAI:
    """OpenAI's client, and what it is asked."""

    errors = openai

    def __init__(self, server: ModelServer) -> None:
        self._options: dict[str, Any] = {"base_url": server.url, "api_key": "none", "max_retries": 0}

    def client(self, gov: ConcurrencyGovernor, *, asynchronous: bool = False, **options: Any) -> Any:
        make = openai.AsyncOpenAI if asynchronous else openai.OpenAI
        return make(http_client=http_client(gov, asynchronous, options), **self._options | options)

    @staticmethod
    def call(client: Any, prompt: str = "good day", **options: Any) -> Any:
        messages = [{"role": "user", "content": prompt}]
        return client.chat.completions.create(model="scripted", messages=messages, **options)

    @staticmethod
    def text(answer: Any) -> str:
        return answer.choices[0].message.content

    @staticmethod
    def piece(event: Any) -> str:
        return event.choices[0].delta.content or ""

    @staticmethod
    def reason(error: BaseException) -> BaseException | None:
        return error


class Anthropic(OpenAI):
    """Anthropic's."""

    errors = anthropic

    def __init__(self, server: ModelServer) -> None:
        self._options = {"base_url": server.root, "api_key": "none", "max_retries": 0}

    def client(self, gov: ConcurrencyGovernor, *, asynchronous: bool = False, **options: Any) -> Any:
        make = anthropic.AsyncAnthropic if asynchronous else anthropic.Anthropic
        return make(http_client=http_client(gov, asynchronous, options), **self._options | options)

    @staticmethod
    def call(client: Any, prompt: str = "good day", **options: Any) -> Any:
        messages = [{"role": "user", "content": prompt}]
        return client.messages.create(model="scripted", max_tokens=99, messages=messages, **options)

    @staticmethod
    def text(answer: Any) -> str:
        return answer.content[0].text

    @staticmethod
    def piece(event: Any) -> str:
        return event.delta.text if event.type == "content_block_delta" else ""

    @staticmethod
    def reason(error: BaseException) -> BaseException | None:
        return error.__cause__


def http_client(gov: ConcurrencyGovernor, asynchronous: bool, options: dict[str, Any]) -> Any:
    acquire_timeout = options.pop("acquire_timeout", None)
    if asynchronous:
        return httpx2.AsyncClient(transport=AsyncGovernedTransport(gov, acquire_timeout=acquire_timeout))
    return httpx2.Client(transport=GovernedTransport(gov, acquire_timeout=acquire_timeout))


@pytest.fixture(params=[OpenAI, Anthropic])
def sdk(request: pytest.FixtureRequest, server: ModelServer) -> OpenAI:
    return request.param(server)


@pytest.fixture
def gov() -> ConcurrencyGovernor:
    return ConcurrencyGovernor(max_streams=3, max_tools=1, max_global=4)


@pytest.fixture
def narrow() -> ConcurrencyGovernor:
    return ConcurrencyGovernor(max_streams=1, max_tools=1, max_global=2)


def streams(gov: ConcurrencyGovernor) -> tuple[int, int]:
    stats = gov.stats()
    return stats.streams_in_use, stats.streams_waiting


def ask_twice(sdk: OpenAI, client: Any, answers: list[str]) -> None:
    """Have one answer in pieces, and one at once."""
    with sdk.call(client, stream=True) as stream:
        answers.append("".join(map(sdk.piece, stream)))
    answers.append(sdk.text(sdk.call(client)))


async def ask_twice_async(sdk: OpenAI, client: Any, answers: list[str]) -> None:
    async with await sdk.call(client, stream=True) as stream:
        answers.append("".join([sdk.piece(event) async for event in stream]))
    answers.append(sdk.text(await sdk.call(client)))


# ----------------------------------------------------------------------------------------- the limit


@pytest.mark.usefixtures("switching")
def test_twenty_threads_reach_the_limit_and_do_not_pass_it(
    sdk: OpenAI, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    answers: list[str] = []
    with sdk.client(gov) as client, Crew() as crew:
        for _ in range(20):
            crew.start(ask_twice, sdk, client, answers)
        until(lambda: server.streams.now == 3 and streams(gov) == (3, 17), "three answers, the rest in line")
        gates.open()
    assert answers == [ANSWER] * 40
    assert server.streams.peak == 3
    assert is_idle(gov)


def test_twenty_tasks_reach_the_limit_and_do_not_pass_it(
    sdk: OpenAI, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    answers: list[str] = []

    async def main() -> None:
        async with sdk.client(gov, asynchronous=True) as client:
            tasks = [asyncio.create_task(ask_twice_async(sdk, client, answers)) for _ in range(20)]
            await until_async(lambda: server.streams.now == 3 and streams(gov) == (3, 17))
            gates.open()
            await asyncio.gather(*tasks)

    asyncio.run(main())
    assert answers == [ANSWER] * 40
    assert server.streams.peak == 3
    assert is_idle(gov)


def test_all_clients_in_threads_and_in_tasks_have_one_limit(
    server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    sdks, answers = [OpenAI(server), Anthropic(server)], []

    async def in_tasks() -> None:
        async with sdks[0].client(gov, asynchronous=True) as a, sdks[1].client(gov, asynchronous=True) as b:
            each = [ask_twice_async(sdk, client, answers) for sdk, client in zip(sdks, (a, b), strict=True)]
            more = [ask_twice_async(sdk, client, answers) for sdk, client in zip(sdks, (a, b), strict=True)]
            await asyncio.gather(*each, *more)

    with sdks[0].client(gov) as a, sdks[1].client(gov) as b, Crew() as crew:
        for sdk, client in zip(sdks, (a, b), strict=True):
            for _ in range(4):
                crew.start(ask_twice, sdk, client, answers)
        crew.start(asyncio.run, in_tasks())
        until(lambda: server.streams.now == 3 and streams(gov) == (3, 9), "three answers, the rest in line")
        gates.open()
    assert answers == [ANSWER] * 24
    assert server.streams.peak == 3
    assert is_idle(gov)


async def until_async(condition: Callable[[], object]) -> None:
    """Let others run until it is so; pytest-timeout has the last word."""
    while not condition():
        await asyncio.sleep(0.001)


# ------------------------------------------------------------------------------------- how it ends


def test_a_stream_holds_its_permit_until_it_is_closed(
    sdk: OpenAI, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    gates.open()
    with sdk.client(gov) as client:
        with sdk.call(client, "word " * 500, stream=True) as stream:
            next(iter(stream))
            assert streams(gov) == (1, 0)
        assert is_idle(gov)
    until(lambda: idle(server), "the server to notice")


def test_a_stream_that_is_dropped_gives_it_back(
    sdk: OpenAI, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    gates.open()
    with sdk.client(gov) as client:
        unread, begun = [sdk.call(client, "word " * 500, stream=True) for _ in range(2)]
        next(iter(begun))
        assert streams(gov) == (2, 0)
        del unread, begun
        gc.collect()
        until(lambda: is_idle(gov), "the permits to come back")
    until(lambda: idle(server), "the server to notice")


def test_the_managers_of_the_clients_hold_it_for_their_blocks(
    server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    gates.open()
    asked = {"model": "scripted", "messages": [{"role": "user", "content": "good day"}]}
    with OpenAI(server).client(gov) as client:
        with client.chat.completions.with_streaming_response.create(**asked) as response:
            assert streams(gov) == (1, 0)
            assert ANSWER in response.read().decode()
        assert is_idle(gov)
        with client.chat.completions.stream(**asked) as events:
            assert streams(gov) == (1, 0)
            assert OpenAI.text(events.get_final_completion()) == ANSWER
        assert is_idle(gov)
    with Anthropic(server).client(gov) as client:
        with client.messages.stream(max_tokens=99, **asked) as stream:
            assert streams(gov) == (1, 0)
            assert stream.get_final_text() == ANSWER
        assert is_idle(gov)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 429, 500])
def test_an_error_gives_it_back(
    sdk: OpenAI, gov: ConcurrencyGovernor, gates: Gates, status: int, stream: bool
) -> None:
    gates.open()
    with sdk.client(gov) as client, pytest.raises(sdk.errors.APIStatusError) as caught:
        sdk.call(client, f"status {status}", stream=stream)
    assert caught.value.status_code == status
    assert is_idle(gov)


def test_a_refused_connection_gives_it_back(sdk: OpenAI, gov: ConcurrencyGovernor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        url = f"http://127.0.0.1:{door.getsockname()[1]}"
    with sdk.client(gov, base_url=url) as client, pytest.raises(sdk.errors.APIConnectionError):
        sdk.call(client)
    assert is_idle(gov)


@pytest.mark.parametrize("stream", [False, True])
def test_a_timeout_of_the_server_gives_it_back(
    sdk: OpenAI, server: ModelServer, gov: ConcurrencyGovernor, stream: bool
) -> None:
    with (
        sdk.client(gov, timeout=0.05) as client,
        pytest.raises((sdk.errors.APITimeoutError, httpx2.ReadTimeout)),
    ):
        answer = sdk.call(client, stream=stream)
        list(answer)
    assert is_idle(gov)


def test_async_every_ending_gives_it_back(
    sdk: OpenAI, server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    async def main() -> None:
        async with sdk.client(gov, asynchronous=True) as client:
            task = asyncio.create_task(sdk.call(client))
            await until_async(lambda: server.streams.now == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert is_idle(gov)
            with pytest.raises(sdk.errors.APITimeoutError):
                await sdk.call(client, timeout=0.05)
            assert is_idle(gov)
            gates.open()
            with pytest.raises(sdk.errors.APIStatusError):
                await sdk.call(client, "status 500")
            assert is_idle(gov)
            async with await sdk.call(client, "word " * 500, stream=True) as stream:
                await anext(aiter(stream))
                assert streams(gov) == (1, 0)
            assert is_idle(gov)
            unread = await sdk.call(client, "word " * 500, stream=True)
            assert streams(gov) == (1, 0)
            del unread
            gc.collect()
            assert is_idle(gov)

    asyncio.run(main())
    until(lambda: idle(server), "the server to notice")


# ------------------------------------------------------------------------------- timeouts and retries


def test_a_wait_that_times_out_is_the_clients_own_timeout_error(
    sdk: OpenAI, server: ModelServer, narrow: ConcurrencyGovernor
) -> None:
    with sdk.client(narrow, acquire_timeout=0.01) as client, narrow.acquire_stream():
        with pytest.raises(sdk.errors.APITimeoutError) as caught:
            sdk.call(client)
        assert isinstance(caught.value.__cause__, httpx2.PoolTimeout)
        assert isinstance(caught.value.__cause__.__cause__, AcquireTimeout)
        assert streams(narrow) == (1, 0)
    assert server.streams.peak == 0
    assert is_idle(narrow)


def test_the_clients_retry_it_until_a_permit_is_free(
    sdk: OpenAI, narrow: ConcurrencyGovernor, gates: Gates
) -> None:
    gates.open()
    tried: list[Any] = []
    with sdk.client(narrow, acquire_timeout=0.01, max_retries=2) as client:
        client._client.event_hooks["request"].append(tried.append)
        with Crew() as crew, narrow.acquire_stream():
            answers: list[Any] = []
            crew.start(lambda: answers.append(sdk.call(client)))
            until(lambda: len(tried) == 2, "a second try")
    assert [*map(sdk.text, answers)] == [ANSWER]
    assert len(tried) in (2, 3)
    assert is_idle(narrow)


def test_between_two_tries_no_permit_is_held(sdk: OpenAI, gov: ConcurrencyGovernor, gates: Gates) -> None:
    gates.open()
    held: list[tuple[int, int]] = []
    with sdk.client(gov, max_retries=1) as client:
        client._client.event_hooks["request"].append(lambda request: held.append(streams(gov)))
        with pytest.raises(sdk.errors.InternalServerError):
            sdk.call(client, "status 500", stream=True)
    assert held == [(0, 0), (0, 0)]
    assert is_idle(gov)


def test_async_the_clients_retry_it_until_a_permit_is_free(
    sdk: OpenAI, narrow: ConcurrencyGovernor, gates: Gates
) -> None:
    gates.open()
    tried: list[Any] = []

    async def note(request: Any) -> None:
        tried.append(request)

    async def main() -> None:
        options = {"asynchronous": True, "acquire_timeout": 0.01, "max_retries": 2}
        async with sdk.client(narrow, **options) as client:
            client._client.event_hooks["request"].append(note)
            with narrow.acquire_stream():
                task = asyncio.create_task(sdk.call(client))
                await until_async(lambda: len(tried) == 2)
            assert sdk.text(await task) == ANSWER

    asyncio.run(main())
    assert is_idle(narrow)


@pytest.mark.parametrize("refusal", [SemaphoreClosed, ConcurrencyLimitExceeded])
def test_other_refusals_pass_through_openai_and_are_the_cause_of_anthropics_own(
    sdk: OpenAI, server: ModelServer, refusal: type[Exception]
) -> None:
    gov = ConcurrencyGovernor(1, 1, 1, max_queued=0)
    with sdk.client(gov) as client, gov.acquire_tool():
        if refusal is SemaphoreClosed:
            gov.close()
        with pytest.raises((refusal, sdk.errors.APIConnectionError)) as caught:
            sdk.call(client)
    assert type(sdk.reason(caught.value)) is refusal
    assert is_idle(gov)


def test_openai_takes_a_governed_client_of_httpx_as_well(
    server: ModelServer, gov: ConcurrencyGovernor, gates: Gates
) -> None:
    httpx = pytest.importorskip("httpx")
    from governor.integrations.httpx import GovernedTransport as GovernedHttpx

    gates.open()
    with (
        httpx.Client(transport=GovernedHttpx(gov)) as http,
        openai.OpenAI(base_url=server.url, api_key="none", http_client=http) as client,
    ):
        with OpenAI.call(client, stream=True) as stream:
            assert streams(gov) == (1, 0)
            assert "".join(map(OpenAI.piece, stream)) == ANSWER
        assert is_idle(gov)
