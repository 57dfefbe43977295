"""Keep an LLM agent inside its limits: concurrent streams, tools, and operations in all."""

from governor._errors import (
    AcquireTimeout,
    ConcurrencyError,
    ConcurrencyLimitExceeded,
    DeadlockError,
    LeaseLost,
    SemaphoreClosed,
)
from governor._events import GovernorEvent
from governor._executor import GovernedExecutor
from governor._governor import Governor, GovernorStats
from governor._in_process import ConcurrencyGovernor
from governor._layer import Layer
from governor._permit import ConcurrencyPermit, suspended
from governor._tree import PermitHolder

__all__ = [
    "AcquireTimeout",
    "ConcurrencyError",
    "ConcurrencyGovernor",
    "ConcurrencyLimitExceeded",
    "ConcurrencyPermit",
    "DeadlockError",
    "GovernedExecutor",
    "Governor",
    "GovernorEvent",
    "GovernorStats",
    "Layer",
    "LeaseLost",
    "PermitHolder",
    "SemaphoreClosed",
    "suspended",
]

for _name in __all__:
    globals()[_name].__module__ = __name__  # tracebacks show the name that users import
