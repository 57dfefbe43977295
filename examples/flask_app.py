"""A Flask app under gunicorn's threads: governed streams to the browser, tools in a governed pool."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from flask import Flask, Response, request
from model_server import ModelServer, fetch
from openai import OpenAI

from governor import AcquireTimeout, ConcurrencyGovernor, GovernedExecutor

MODEL_URL = os.environ.get("MODEL_URL", "http://127.0.0.1:8765/v1")

app = Flask(__name__)
gov = ConcurrencyGovernor.from_env()  # limits are per process: with two workers, give each the half
pool = GovernedExecutor(gov, ThreadPoolExecutor(gov.stats().tools_max))
client = OpenAI(base_url=MODEL_URL, api_key="none")


@gov.stream(timeout=30)
def answer(prompt: str) -> Iterator[str]:
    """Yield a model's answer, piece by piece."""
    messages = [{"role": "user", "content": prompt}]
    with client.chat.completions.create(model="scripted", messages=messages, stream=True) as chunks:
        for chunk in chunks:
            yield chunk.choices[0].delta.content or ""


@app.get("/ask")
def ask() -> Response:
    """Stream an answer; the server closes it when the browser goes away, and its permit is back."""
    return Response(answer(request.args["prompt"]), mimetype="text/plain")


@app.get("/fetch")
def fetch_pages() -> list[str]:
    """Fetch pages, as many at once as there are permits for."""
    root = MODEL_URL.removesuffix("/v1")
    return list(pool.map(fetch, [f"{root}/{page}" for page in request.args.getlist("page")]))


@app.get("/stats")
def stats() -> dict[str, int]:
    """Return what runs and what waits, in this process."""
    now = gov.stats()
    names = ("streams_in_use", "streams_waiting", "tools_in_use", "tools_waiting", "global_in_use")
    return {name: getattr(now, name) for name in names}


@app.errorhandler(AcquireTimeout)
def busy(error: AcquireTimeout) -> tuple[str, int]:
    """Say that there was no permit in time."""
    return str(error), 503


@contextmanager
def gunicorn(model_url: str, **limits: int) -> Iterator[str]:
    """Run the app in a gunicorn of one worker with sixteen threads; give its address."""
    settings = {f"GOVERNOR_{name.upper()}": str(limit) for name, limit in limits.items()}
    with socket.create_server(("127.0.0.1", 0), backlog=64) as door:
        command = [sys.executable, "-m", "gunicorn", "--worker-class", "gthread", "--threads", "16"]
        options = ["--bind", f"fd://{door.fileno()}", "--no-control-socket", "--log-level", "warning"]
        server = subprocess.Popen(
            [*command, *options, "flask_app:app"],
            cwd=Path(__file__).parent,
            env=os.environ | settings | {"MODEL_URL": model_url},
            pass_fds=[door.fileno()],
        )
        url = f"http://127.0.0.1:{door.getsockname()[1]}"
    try:
        yield url
    finally:
        server.terminate()
        server.wait()


def get(url: str) -> str:
    """Fetch a page of the app."""
    with urllib.request.urlopen(url, timeout=30) as page:
        return page.read().decode()


def main() -> None:
    """Ask eight questions and fetch eight pages at once."""
    asked = [f"/ask?prompt=question+{number}" for number in range(8)]
    fetched = [f"/fetch?page={number}&page=more" for number in range(4)]
    limits = {"max_streams": 2, "max_tools": 3, "max_global": 4}
    with ModelServer() as server, gunicorn(server.url, **limits) as url, ThreadPoolExecutor(12) as browsers:
        answers = list(browsers.map(lambda path: get(url + path), asked + fetched))
        print(answers[0])
        print(f"{len(answers)} requests; the server's counts: {server.stats()}")
        print(f"in use now: {json.loads(get(url + '/stats'))['global_in_use']}")


if __name__ == "__main__":
    main()
