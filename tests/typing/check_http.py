"""Checked by type checkers, never run: governed transports fit the clients they are made for.

A `type: ignore` states that its line is an error: where it is not, the comment is reported.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

import httpx
import httpx2
import requests

from governor import ConcurrencyGovernor
from governor.integrations import httpx as for_httpx
from governor.integrations import httpx2 as for_httpx2
from governor.integrations.requests import GovernedAdapter

gov = ConcurrencyGovernor.with_defaults()


def is_a_post(request: httpx2.Request) -> bool:
    return request.method == "POST"


def clients() -> None:
    httpx.Client(transport=for_httpx.GovernedTransport(gov))
    httpx.AsyncClient(transport=for_httpx.AsyncGovernedTransport(gov, httpx.AsyncHTTPTransport(retries=1)))
    httpx2.Client(transport=for_httpx2.GovernedTransport(gov, kind="tool", acquire_timeout=5, when=is_a_post))
    httpx2.AsyncClient(transport=for_httpx2.AsyncGovernedTransport(gov, when=lambda it: it.url.path != "/"))
    httpx.Client(transport=for_httpx2.GovernedTransport(gov))  # type: ignore
    httpx2.Client(transport=for_httpx2.AsyncGovernedTransport(gov))  # type: ignore
    for_httpx2.GovernedTransport(gov, httpx.HTTPTransport())  # type: ignore
    for_httpx2.GovernedTransport(gov, kind="toll")  # type: ignore
    for_httpx.GovernedTransport(gov, when=is_a_post)  # type: ignore


def sessions() -> None:
    session = requests.Session()
    session.mount("https://", GovernedAdapter(gov, when=lambda it: it.method == "POST", pool_maxsize=20))
    session.mount("https://", GovernedAdapter(gov, kind="toll"))  # type: ignore
    session.mount("https://", GovernedAdapter(gov, 5))  # type: ignore
