"""An adapter whose library is not there says what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import governor


@pytest.mark.parametrize(
    ("adapter", "library", "package"),
    [
        ("celery", "celery", "celery"),
        ("langchain", "langchain", "langchain"),
        ("opentelemetry", "opentelemetry", "opentelemetry-api"),
        ("prometheus", "prometheus_client", "prometheus-client"),
        ("smolagents", "smolagents", "smolagents"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(adapter: str, library: str, package: str) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(Path(governor.__file__).parents[1])!r})
sys.modules[{library!r}] = None
try:
    import governor.integrations.{adapter}
except ImportError as error:
    assert isinstance(error.__cause__, ImportError)
    print(error)
"""
    said = subprocess.check_output([sys.executable, "-I", "-c", program], text=True, timeout=15)
    assert said == (
        f"governor.integrations.{adapter} needs {package}: pip install 'concurrency-governor[{adapter}]'\n"
    )
