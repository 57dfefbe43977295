"""The fleet: one budget for many processes and hosts, with its books in Redis or Valkey."""

from governor.redis._governor import FleetPermit, RedisGovernor

__all__ = ["FleetPermit", "RedisGovernor"]

for _name in __all__:
    globals()[_name].__module__ = __name__  # tracebacks show the name that users import
