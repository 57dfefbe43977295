"""An sqlite file that says which module uses which word how often.

The only module of the demo that imports sqlite3, which an interpreter may lack.
"""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

__all__ = ["Database"]

_WORD = re.compile(r"[a-z_]{3,}")
_TOP_MODULES = """
    SELECT module FROM words WHERE word LIKE '%' || ? || '%'
    GROUP BY module ORDER BY SUM(uses) DESC, module LIMIT 3
"""
_TOP_WORD = """
    SELECT module, word, uses FROM words WHERE module = ? AND word LIKE '%' || ? || '%'
    ORDER BY uses DESC, word LIMIT 1
"""


class Database:
    """Builds the file at `path` from source files, given by name; then answers queries.

    Each query has a connection of its own, so any thread may ask.
    """

    def __init__(self, path: Path, modules: Mapping[str, Path]) -> None:
        self._path = path
        # The connection's own `with` commits, but does not close.
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("CREATE TABLE words (module TEXT, word TEXT, uses INTEGER)")
            for name, file in modules.items():
                uses = Counter(_WORD.findall(file.read_text(encoding="utf-8", errors="replace")))
                rows = ((name, word, count) for word, count in uses.items())
                connection.executemany("INSERT INTO words VALUES (?, ?, ?)", rows)

    def query(self, part: str) -> str:
        """Name the three modules that use words with this part most, each with its first word."""
        with closing(sqlite3.connect(self._path)) as connection:
            modules = connection.execute(_TOP_MODULES, (part,)).fetchall()
            words = [connection.execute(_TOP_WORD, (*row, part)).fetchone() for row in modules]
        return ", ".join(f"{module}: {word} {uses}" for module, word, uses in words)
