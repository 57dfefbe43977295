"""What the tools work on: the source files of this Python installation."""

from __future__ import annotations

import sysconfig
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from governor._demo.database import Database

__all__ = ["Workshop", "open_workshop"]


@dataclass(frozen=True)
class Workshop:
    """Real files for the tools.

    Attributes:
        modules: The files of some of the standard library's modules, by name.
        database: What is in them; None where the interpreter has no sqlite3.
    """

    modules: Mapping[str, Path]
    database: Database | None


@contextmanager
def open_workshop() -> Generator[Workshop]:
    """Build a workshop, in a temporary folder that lasts as long as the block."""
    modules = {file.name: file for file in _source_files()}
    with tempfile.TemporaryDirectory(prefix="governor-demo-", ignore_cleanup_errors=True) as folder:
        yield Workshop(modules, _build_database(Path(folder), modules))


def _source_files() -> list[Path]:
    """Return half of the standard library's modules, or where those are zipped, the demo's own."""
    for folder in (Path(sysconfig.get_path("stdlib")), Path(__file__).parent):
        # Debian ships a sitecustomize.py that may be a link to nowhere.
        if files := sorted(file for file in folder.glob("*.py") if file.is_file()):
            return files[::2]  # work enough, and half the time to index them
    raise FileNotFoundError("this Python installation comes without source files to work on")


def _build_database(folder: Path, modules: Mapping[str, Path]) -> Database | None:
    """Build the database, if the interpreter can."""
    # Not sqlite3, which is always there, but the compiled part of it that a lean build lacks.
    if find_spec("_sqlite3") is None:
        return None
    from governor._demo.database import Database

    return Database(folder / "words.sqlite", modules)
