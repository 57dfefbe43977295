"""Who may import whom, and what `import governor` costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

import governor

HOME = Path(governor.__file__).parent

# A room imports only from floors below it. The face stands above all that it hands on, so what
# stands above the face may come in by it.
FLOORS = {
    "_errors": 0,
    "_validate": 0,
    "_deadlock": 0,
    "_events": 0,
    "_tree": 1,
    "_layer": 2,
    "_permit": 2,
    "_request": 3,
    "_stream": 3,
    "_calls": 3.5,
    "_governor": 4,
    "_in_process": 4.5,
    "_executor": 5,
    "__init__": 5.5,
    "testing": 6,
    "integrations": 6,
    "redis": 6,
    "_demo": 7,
    "_fleet": 7,
    "_cli": 7,
    "__main__": 7,
}
FACE = FLOORS["__init__"]
TOP = max(FLOORS.values())


def room_of(module: str) -> str:
    """Return the room that a module lies in: ``redis`` for ``governor.redis._script``."""
    return [*module.split("."), "__init__"][1]


def module_of(file: Path) -> str:
    return ".".join([HOME.name, *file.relative_to(HOME).with_suffix("").parts])


def rooms_imported(file: Path) -> Iterator[str]:
    """Yield the room behind each import from within the package, wherever it stands in ``file``."""
    package = module_of(file).rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_bytes())):
        match node:
            case ast.Import(names):
                targets = [alias.name for alias in names]
            case ast.ImportFrom(module, names, level):
                source = resolve_name("." * (level or 0) + (module or ""), package)
                targets = [f"{source}.{alias.name}" for alias in names]
            case _:
                continue
        for target in targets:
            if target.split(".")[0] == HOME.name:
                room = room_of(target)
                # `from governor import Layer` names no room: it comes in by the face.
                yield room if room in FLOORS else "__init__"


@pytest.mark.parametrize("file", sorted(HOME.rglob("*.py")), ids=lambda file: str(file.relative_to(HOME)))
def test_a_room_imports_only_from_floors_below_it(file: Path) -> None:
    room = room_of(module_of(file))
    assert room in FLOORS, f"{room} has no floor yet: give it one here and in the picture in the docs"
    below = {other for other, floor in FLOORS.items() if floor < FLOORS[room] or floor == TOP == FLOORS[room]}
    assert set(rooms_imported(file)) <= below | {room}


def test_the_face_hands_on_and_defines_nothing() -> None:
    body = ast.parse((HOME / "__init__.py").read_bytes())
    defined = [node.name for node in ast.walk(body) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert defined == []


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    """Every module that `import governor` loads in an interpreter of its own."""
    program = (
        f"import sys; sys.path.insert(0, {str(HOME.parent)!r}); before = set(sys.modules); "
        "import governor; print(*set(sys.modules) - before)"
    )
    return set(subprocess.check_output([sys.executable, "-I", "-c", program], text=True).split())


def test_importing_it_loads_nothing_but_the_stdlib(loaded: set[str]) -> None:
    unlisted = {"_missing_stdlib_info"}  # by mistake; from 3.15 on `traceback` imports it
    found = {module.split(".")[0] for module in loaded}
    assert found - sys.stdlib_module_names - unlisted == {HOME.name}


def test_importing_it_loads_nothing_that_only_the_upper_floors_need(loaded: set[str]) -> None:
    rooms = {room_of(module) for module in loaded if module.split(".")[0] == HOME.name}
    assert max(FLOORS[room] for room in rooms) == FACE
    assert loaded & {"argparse", "asyncio", "http", "multiprocessing", "socket", "sqlite3"} == set()
