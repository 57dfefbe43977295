"""Every Python snippet of the README and the docs runs as printed.

The blocks of one page are one program, which runs in an interpreter of its own and may print
nothing on stderr. A block that cannot run says why, in the line above it:
``<!-- not run: needs an account with the provider -->``. One that needs packages names them as they
are imported, ``<!-- needs: langchain flask -->``, and is run where they are installed; a page may need
some as a whole, ``<!-- page needs: openai requests -->``. The models that are asked are the examples'
server.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

import pytest
from model_server import ModelServer
from serving import Gates

import governor

ROOT = Path(__file__).parents[1]

BLOCK = re.compile(
    r"^(?:(?P<excuse> *<!-- not run: \S.*-->)\n\n?)?"
    r"(?:^ *<!-- needs: (?P<needs>\S.*) -->\n\n?)?"
    r"(?P<indent> *)```py(?:thon)?\b.*\n(?P<code>(?s:.*?))^(?P=indent)```$",
    re.MULTILINE,
)

NEEDS = re.compile(r"^<!-- page needs: (.+) -->$", re.MULTILINE)

PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text("utf-8")
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}


def is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False


def program_of(page: str) -> str:
    """Return the page's code, each line at its place in the page, so that tracebacks point there."""
    lines = [""] * page.count("\n")
    for block in BLOCK.finditer(page):
        if not block["excuse"] and all(map(is_installed, (block["needs"] or "").split())):
            code = dedent(block["code"]).splitlines()
            first = page.count("\n", 0, block.start("code"))
            lines[first : first + len(code)] = code
    return "\n".join(lines)


def needs_of(page: str) -> list[str]:
    """Return the packages without which nothing of a page is run."""
    return [name for needs in NEEDS.findall(page) for name in needs.split()]


@pytest.mark.timeout(60)  # some import many packages
@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if BLOCK.search(page)])
def test_the_snippets_of_a_page_run(name: str, tmp_path: Path, server: ModelServer, gates: Gates) -> None:
    program = program_of(PAGES[name])
    assert program.strip(), "no block of this page is run"
    missing = [it for it in needs_of(PAGES[name]) if not is_installed(it)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    gates.open()
    models = {
        "ANTHROPIC_API_KEY": "none",
        "ANTHROPIC_BASE_URL": server.root,
        "OPENAI_API_KEY": "none",
        "OPENAI_BASE_URL": server.url,
    }
    script = tmp_path / Path(name).name
    script.write_text(program, "utf-8")
    # Development mode tells of whatever others do, and of each slow step of an event loop.
    strict = ["-W", "default::ResourceWarning"] if "needs: " in PAGES[name] else ["-X", "dev"]
    done = subprocess.run(
        # A fork beside threads, which a page shows, is warned about from 3.12 on.
        [sys.executable, *strict, "-W", "ignore:This process:DeprecationWarning", "-P", script],
        cwd=tmp_path,
        env=os.environ | models | {"PYTHONPATH": str(Path(governor.__file__).parents[1])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
    )
    if done.returncode or done.stderr:
        pytest.fail(f"exit status {done.returncode}\n{done.stderr}", pytrace=False)


def test_code_stays_in_its_line_and_an_excused_block_is_left_out() -> None:
    page = """\
    Title
    ```python
    first = 1
    ```
    - In a list:
      ```py
      if first:
          second = 2
      ```
    ```console
    $ not python
    ```
    <!-- not run: it would cost money -->

    ```python
    third = 3
    ```
    <!-- needs: json re -->
    ```python
    fourth = 4
    ```
    <!-- needs: json no_such_package.at_all -->

    ```python
    fifth = 5
    ```
    """
    assert program_of(dedent(page)).split("\n") == [
        *["", "", "first = 1", ""],
        *["", "", "if first:", "    second = 2", ""],
        *["", "", ""],
        *["", "", "", "", ""],
        *["", "", "fourth = 4", ""],
        *["", "", "", "", ""],
    ]


def test_a_page_may_need_packages() -> None:
    assert needs_of("# Title\n\n<!-- page needs: openai requests -->\n\nText") == ["openai", "requests"]
    assert needs_of("<!-- needs: openai -->\n```python\n```") == []
