"""The fleet: one budget for many processes and hosts, with its books in Redis or Valkey."""

try:
    import redis as _redis
except ImportError as error:
    raise ImportError("governor.redis needs redis: pip install 'concurrency-governor[redis]'") from error

from governor.redis._governor import FleetPermit, RedisGovernor

del _redis

__all__ = ["FleetPermit", "RedisGovernor"]

for _name in __all__:
    globals()[_name].__module__ = __name__  # tracebacks show the name that users import
