"""A base class for Celery's tasks: each run of a task is under a permit."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Self

try:
    from celery import Task
except ImportError as error:
    raise ImportError(
        "governor.integrations.celery needs celery: pip install 'concurrency-governor[celery]'"
    ) from error

from governor._governor import Governor
from governor._in_process import ConcurrencyGovernor
from governor._permit import Kind

__all__ = ["GovernedTask"]


if TYPE_CHECKING:
    _Task = Task[..., Any]
else:
    _Task = Task  # not generic at run time in every version


class GovernedTask(_Task):
    """A task that waits for a permit before each run, and gives it back after it.

    For one task, or for all tasks of an app::

        @app.task(base=GovernedTask)
        def resize(path): ...

        app = Celery(task_cls=GovernedTask)

    The attributes below are options of the decorator, too: ``@app.task(base=GovernedTask,
    kind="stream", acquire_timeout=30)``.

    A run that gets no permit fails with ``AcquireTimeout``, ``ConcurrencyLimitExceeded`` or
    ``SemaphoreClosed``. Those that Celery is told to retry, by ``autoretry_for=[AcquireTimeout]``,
    are queued again as any other.

    Limits hold in one process. In a worker with threads they bound the whole worker; in a prefork
    worker each child has a governor of its own, and runs one task at a time.

    Attributes:
        governor: Whose permits to take. None: ``ConcurrencyGovernor.shared()``, asked at each run.
        kind: ``"tool"`` or ``"stream"``.
        acquire_timeout: Seconds that a run waits for its permit; None waits for ever.
    """

    governor: Governor | None = None
    kind: Kind = "tool"
    acquire_timeout: float | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Govern the task's ``run``."""
        # Not `__call__`: Celery wraps `run` for its retries, which are to see a refused permit. And
        # not `__init__`: a task's own seldom calls its base's.
        task: Any = super().__new__(cls)
        run = task.run

        @functools.wraps(run)
        def governed(*args: Any, **kwargs: Any) -> Any:
            governor = task.governor or ConcurrencyGovernor.shared()
            with governor.acquire(task.kind, task.acquire_timeout):
                return run(*args, **kwargs)

        task.run = governed
        return task  # type: ignore[no-any-return]
