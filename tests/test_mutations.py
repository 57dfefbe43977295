"""The mutations of `mutations.py` still fit the source, the tests, and the page that tells of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from mutations import MUTATIONS, ROOT, Mutation, row, source_of

PROMISES = {f"{number}." for number in range(1, 10)}


def functions_of(file: Path) -> set[str]:
    return {it.name for it in ast.parse(file.read_bytes()).body if isinstance(it, ast.FunctionDef)}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda it: it.part)
def test_a_mutation_changes_the_source_and_its_tests_exist(mutation: Mutation) -> None:
    text = source_of(mutation.old).read_text("utf-8")
    changed = ast.parse(text.replace(mutation.old, mutation.new))
    assert ast.dump(changed) != ast.dump(ast.parse(text))
    assert mutation.tests
    for test in mutation.tests:
        file, _, function = test.partition("::")
        assert function.partition("[")[0] in functions_of(ROOT / "tests" / file)


def test_each_promise_is_broken() -> None:
    assert {mutation.part[:2] for mutation in MUTATIONS} == PROMISES
    parts = [(mutation.part, mutation.breaks) for mutation in MUTATIONS]
    assert len(parts) == len(set(parts))


def test_the_page_has_each_mutation_and_no_other() -> None:
    page = (ROOT / "docs" / "design.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and line[2:4] in PROMISES]
    assert [line.rpartition(" |")[0].rpartition(" ")[0] for line in rows] == [row(it) for it in MUTATIONS]
