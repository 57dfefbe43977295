"""An adapter whose library is not there says what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import governor


@pytest.mark.parametrize(
    ("module", "library", "package"),
    [
        ("integrations.celery", "celery", "celery"),
        ("integrations.langchain", "langchain", "langchain"),
        ("integrations.opentelemetry", "opentelemetry", "opentelemetry-api"),
        ("integrations.prometheus", "prometheus_client", "prometheus-client"),
        ("integrations.smolagents", "smolagents", "smolagents"),
        ("redis", "redis", "redis"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(module: str, library: str, package: str) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(Path(governor.__file__).parents[1])!r})
sys.modules[{library!r}] = None
try:
    import governor.{module}
except ImportError as error:
    assert isinstance(error.__cause__, ImportError)
    print(error)
"""
    said = subprocess.check_output([sys.executable, "-I", "-c", program], text=True, timeout=15)
    assert said == (
        f"governor.{module} needs {package}: "
        f"pip install 'concurrency-governor[{module.rpartition('.')[2]}]'\n"
    )
