"""What the installed wheel holds, and what it says of itself."""

from __future__ import annotations

import os
import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest

import governor

ROOT = Path(__file__).parents[1]


def installed() -> Distribution | None:
    """Return the distribution that `import governor` comes from, if it is an installed wheel."""
    try:
        found = distribution("concurrency-governor")
    except PackageNotFoundError:
        return None
    face = "governor/__init__.py"
    recorded = f"{face}," in (found.read_text("RECORD") or "")
    return found if recorded and Path(str(found.locate_file(face))).samefile(governor.__file__) else None


@pytest.fixture(scope="module")
def wheel() -> Distribution:
    found = installed()
    if found is None and "TOX_ENV_DIR" in os.environ:
        pytest.fail(f"tox must test the wheel that it built, not {governor.__file__}")
    if found is None:
        pytest.skip("the working tree is under test, not an installed wheel")
    return found


def test_the_wheel_holds_the_package_as_it_is_in_the_tree_and_nothing_else(wheel: Distribution) -> None:
    assert wheel.files is not None
    shipped = {file.as_posix() for file in wheel.files if "__pycache__" not in file.parts}
    own = {file for file in shipped if not re.match(r"\.\./|[^/]+\.dist-info/", file)}
    tree = {file.relative_to(ROOT).as_posix() for file in (ROOT / "governor").rglob("*.*")}
    assert own == {file for file in tree if "__pycache__" not in file}


def test_the_types_are_shipped(wheel: Distribution) -> None:
    assert "governor/py.typed" in map(str, wheel.files or ())


def test_the_version_is_the_newest_of_the_changelog(wheel: Distribution) -> None:
    newest = re.search(r"^## \[?(\d+\.\d+\.\d+)\b", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert newest is not None
    assert wheel.version == newest[1]


def test_nothing_else_is_needed_to_run_it(wheel: Distribution) -> None:
    assert [needed for needed in wheel.requires or () if "extra ==" not in needed] == []


def test_the_command_is_there(wheel: Distribution) -> None:
    (command,) = wheel.entry_points.select(group="console_scripts", name="governor")
    assert callable(command.load())
