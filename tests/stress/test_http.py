"""Interrupts at every point of a governed request: no permit is lost, and none comes back twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from types import FunctionType
from typing import TYPE_CHECKING, Any

import pytest
from threads import is_idle, until

from governor import ConcurrencyGovernor

if TYPE_CHECKING:
    from stress.injector import Injector

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:.* was dropped unreleased:ResourceWarning"),
]

LIBRARIES = ["httpx", "httpx2", "requests"]
# Now, as an injector counts the code that is there when it is made.
ADAPTERS = {name: import_module(f"governor.integrations.{name}") for name in LIBRARIES if find_spec(name)}

Act = Callable[[], object]


def through_httpx(name: str, gov: ConcurrencyGovernor) -> Act:
    library = pytest.importorskip(name)

    class Stream(library.SyncByteStream):  # type: ignore[name-defined]
        def __iter__(self) -> Iterator[bytes]:
            yield b"some"
            yield b"more"

    class Transport(library.BaseTransport):  # type: ignore[name-defined]
        def handle_request(self, request: Any) -> Any:
            return library.Response(200, stream=Stream())

    transport, request = (
        ADAPTERS[name].GovernedTransport(gov, Transport()),
        library.Request("GET", "http://nowhere/"),
    )

    def act() -> None:
        response = transport.handle_request(request)
        assert gov.stats().streams_in_use == 1
        assert b"".join(response.stream) == b"somemore"
        response.stream.close()

    return act


def through_requests(gov: ConcurrencyGovernor) -> Act:
    requests = pytest.importorskip("requests")
    from urllib3 import HTTPConnectionPool, HTTPResponse

    class Adapter(requests.adapters.HTTPAdapter):  # type: ignore[name-defined]
        def send(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            pool = HTTPConnectionPool("nowhere")
            body = HTTPResponse(
                BytesIO(b"some"), status=200, preload_content=False, pool=pool, connection=pool._new_conn()
            )
            return self.build_response(request, body)

    class Governed(ADAPTERS["requests"].GovernedAdapter, Adapter):  # type: ignore[name-defined]
        pass

    governed, request = Governed(gov), requests.Request("GET", "http://nowhere/").prepare()

    def act() -> None:
        response = governed.send(request)
        assert gov.stats().streams_in_use == 1
        assert response.content == b"some"
        response.close()

    return act


@pytest.mark.usefixtures("finalizers_may_be_interrupted")
@pytest.mark.parametrize("name", LIBRARIES)
def test_no_interrupt_loses_a_permit(injector: Injector, name: str) -> None:
    from stress.injector import every_point

    gov = ConcurrencyGovernor(1, 1, 1)
    act = through_requests(gov) if name == "requests" else through_httpx(name, gov)
    assert isinstance(act, FunctionType)
    act(), act()  # each instruction as it is when warm

    def run(*plan: int) -> None:
        error = injector.run(act, *plan)
        del error  # with all that it leads to
        if not injector.missed:
            until(lambda: is_idle(gov), f"the permit to come back, interrupted at {injector.points}")

    assert len([*every_point(injector, run)]) > 50
