"""The page of the API leaves out nothing that is public."""

import re
from pathlib import Path

import pytest

import governor

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
PACKAGE = Path(governor.__file__).parent


def public_modules() -> list[str]:
    paths = [
        (file.parent if file.name == "__init__.py" else file.with_suffix("")).relative_to(PACKAGE.parent)
        for file in PACKAGE.rglob("*.py")
        if file.read_text("utf-8")  # not the package of the adapters, which is empty
    ]
    names = [".".join(path.parts) for path in paths if not any(part.startswith("_") for part in path.parts)]
    return sorted({*names} - {"governor"})


@pytest.mark.parametrize("name", governor.__all__)
def test_the_api_has_every_public_name(name: str) -> None:
    assert re.search(rf"^\.\. auto\w+:: {name}\b", PAGE.read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize("module", public_modules())
def test_the_api_has_every_public_module(module: str) -> None:
    assert f"## {module}\n" in PAGE.read_text("utf-8")


@pytest.mark.parametrize("page", sorted(PAGE.parent.glob("*.md")), ids=lambda page: page.name)
def test_the_tests_that_a_page_names_are_there(page: Path) -> None:
    tests = "".join(file.read_text("utf-8") for file in Path(__file__).parent.rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)(?:\[.*?\])?`", page.read_text("utf-8")))
    assert {name for name in named if f"def {name}(" not in tests} == set()
