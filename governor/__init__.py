"""Keep an LLM agent inside its limits: concurrent streams, tools, and operations in all."""

from governor._errors import (
    AcquireTimeout,
    ConcurrencyError,
    ConcurrencyLimitExceeded,
    SemaphoreClosed,
)
from governor._executor import GovernedExecutor
from governor._governor import ConcurrencyGovernor, GovernorStats
from governor._layer import Layer
from governor._permit import ConcurrencyPermit

__all__ = [
    "AcquireTimeout",
    "ConcurrencyError",
    "ConcurrencyGovernor",
    "ConcurrencyLimitExceeded",
    "ConcurrencyPermit",
    "GovernedExecutor",
    "GovernorStats",
    "Layer",
    "SemaphoreClosed",
]

for _name in __all__:
    globals()[_name].__module__ = __name__  # tracebacks show the name that users import
