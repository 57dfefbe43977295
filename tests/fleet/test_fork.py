"""Fork: the child is another process of the fleet, which holds nothing and waits for nothing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

import pytest
from fleet.books import Books
from fleet.servers import Server, redis
from stress.test_fork import die_when_stuck, in_child
from threads import Crew, until

from governor import ConcurrencyGovernor, ConcurrencyPermit
from governor.redis import RedisGovernor

__all__ = ["redis"]  # what skips this file where it cannot be had

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # that fork and threads do not mix
]

Join = Callable[..., RedisGovernor]

LIMITS = {"max_streams": 2, "max_tools": 2, "max_global": 3, "lease": 2.0}


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def in_use(gov: RedisGovernor) -> int:
    return gov.stats().global_in_use


def pids(gov: RedisGovernor) -> list[int]:
    return sorted(int(str(holder.process).rpartition(":")[2]) for holder in gov.holders())


def test_permits_held_across_a_fork_are_inert_in_the_child(join: Join, books: Books) -> None:
    gov = join(**LIMITS)
    held, spare = gov.acquire_tool(), gov.acquire_stream()
    permits = [held, spare]

    def check() -> None:
        assert not any(permit.held for permit in permits)
        permits.pop().release()
        permits.clear()
        assert in_use(gov) == 2  # the parent's
        with gov.acquire_tool(timeout=5):
            assert len(set(pids(gov))) == 2
            assert os.getpid() in pids(gov)
            assert gov.try_acquire_tool() is None
        gov.close()

    in_child(check)
    assert held.held
    assert spare.held
    assert pids(gov) == [os.getpid()] * 2
    assert books.sessions == 1
    held.release()
    spare.release()
    until(books.empty, "nothing in the books")


def test_what_a_child_had_is_back_within_a_lease_of_its_end(join: Join) -> None:
    gov = join(**LIMITS)
    kept: list[ConcurrencyPermit] = []

    def leave_without_a_word() -> None:
        kept.append(gov.acquire_tool(timeout=5))
        assert in_use(gov) == 1

    in_child(leave_without_a_word)
    with gov.acquire_tool(timeout=8), gov.acquire_tool(timeout=8):  # both places
        assert pids(gov) == [os.getpid()] * 2
    assert in_use(gov) == 0


def test_nobody_of_the_parents_stands_in_the_childs_line(join: Join) -> None:
    gov = join(**{**LIMITS, "max_tools": 1})
    permit = gov.acquire_tool()
    with Crew() as crew:
        crew.start(lambda: gov.acquire_tool().release())
        until(lambda: gov.stats().tools_waiting == 1, "one in line")

        def check() -> None:
            assert gov.stats().tools_waiting == 1  # the parent's
            with gov.acquire_stream(timeout=5):
                pass
            gov.close()

        in_child(check)
        assert gov.stats().tools_waiting == 1
        permit.release()
    assert in_use(gov) == 0


def test_the_end_of_an_inherited_block_gives_nothing_back(join: Join, pipe: tuple[int, int]) -> None:
    gov = join(**LIMITS)
    with gov.acquire_tool():
        pid = os.fork()
        if pid == 0:
            die_when_stuck()
        else:
            # The parent stays inside until the child has come out of its own end of the block.
            assert os.read(pipe[0], 9) == b"1"
    if pid == 0:
        os.write(pipe[1], repr(in_use(gov)).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert in_use(gov) == 0


def test_a_child_of_a_busy_parent_works_many_times(join: Join) -> None:
    gov = join(**LIMITS)
    over = threading.Event()

    def load() -> None:
        while not over.is_set():
            with gov.acquire_tool():
                pass

    def check() -> None:
        for _ in range(3):
            with gov.acquire_tool(timeout=8):
                pass
        gov.close()

    with Crew(patience=15) as crew:
        for _ in range(3):
            crew.start(load)
        try:
            for _ in range(15):
                in_child(check)
        finally:
            over.set()
    assert in_use(gov) == 0


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_workers_of_a_server_that_loads_before_it_forks_share_the_limits(
    join: Join, books: Books, pipe: tuple[int, int], used: bool
) -> None:
    """As ``gunicorn --preload`` does: the parent makes the governor, and only its children work."""
    gov = join(**LIMITS)
    if used:
        gov.acquire_tool().release()
    go, children = pipe, []
    reader, writer = os.pipe()
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            die_when_stuck()
            status = 1
            try:
                first = gov.try_acquire_tool()
                os.write(writer, b"1" if first else b"0")
                os.read(go[0], 1)  # until all have tried
                if first:
                    first.release()
                with gov.acquire_tool(timeout=8):
                    pass
                gov.close()
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
    tried = b"".join(os.read(reader, 1) for _ in children)
    assert sorted(tried) == sorted(b"110")  # two tools, over all of them
    assert len(set(pids(gov))) == 2
    assert os.getpid() not in pids(gov)
    os.write(go[1], b"go!")
    for pid in children:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for end in (reader, writer):
        os.close(end)
    until(books.empty, "nothing in the books")
    assert books.sessions <= 1


def test_a_governor_whose_making_failed_spoils_no_fork(server: Server) -> None:
    plain = ConcurrencyGovernor(1, 1, 1)
    taken = plain.acquire_tool()
    with pytest.raises(ValueError, match="slow_wait") as kept:
        RedisGovernor(server.url, "none", slow_wait=-1)
    child = os.fork()
    if not child:
        os._exit(0 if plain.try_acquire_tool() is not None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    taken.release()
    del kept
