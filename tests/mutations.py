"""Break each promise on purpose, and see which tests notice: `python tests/mutations.py`.

Each mutation changes one place of a copy of the package, and runs the tests that are named for it. They
must fail; a run that hangs until it is stopped has failed, too. It prints the table of docs/design.md, and
its status is 1 if a mutation went unnoticed. Names of parts as arguments run only what contains one of them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

__all__ = ["MUTATIONS", "Mutation", "row", "source_of"]

ROOT = Path(__file__).parents[1]
TIMEOUT = 150.0


class Mutation(NamedTuple):
    """One way to break a promise.

    ``old`` stands exactly once in the files of the core. ``tests`` are files in tests/ with the name of a
    function, each of which notices by itself or together with the others.
    """

    part: str
    breaks: str
    old: str
    new: str
    tests: tuple[str, ...]


def source_of(old: str) -> Path:
    """Return the one file of the core that has this text once."""
    found = {file: file.read_text("utf-8").count(old) for file in (ROOT / "governor").glob("_*.py")}
    (file,) = [file for file, count in found.items() if count]
    if found[file] != 1:
        raise ValueError(f"{found[file]} times in {file.name}:\n{old}")
    return file


def row(mutation: Mutation) -> str:
    """Return the row of the table, without the result."""
    tests = ", ".join(f"`{test.replace('::', '` `')}`" for test in mutation.tests)
    return f"| {mutation.part} | {mutation.breaks} | {tests} |"


MUTATIONS = [
    # ------------------------------------------------------------------------- 1. all or nothing
    Mutation(
        "1. A permit takes one of every layer",
        "the global place is not taken",
        "                root.room -= 1\n",
        "",
        ("test_permit.py::test_a_permit_holds_one_of_its_kind_until_its_block_ends",),
    ),
    Mutation(
        "1. ... in one step, or none",
        "grant without a look at the global layer",
        "leaf.room > 0 and root.room > 0:",
        "leaf.room > 0:",
        ("test_layer.py::test_where_one_layer_is_full_none_is_taken",),
    ),
    Mutation(
        "1. ... an agent's limit included",
        "grant without a look at the layer in the middle",
        "(middle.room > 0 and not middle.closed)",
        "not middle.closed",
        ("test_governor.py::test_agents_do_not_multiply_the_limits_they_share",),
    ),
    Mutation(
        "1. ... for those who only try, too",
        "a try looks only at whether layers are closed",
        "            if node.room <= 0 or node.closed:\n",
        "            if node.closed:\n",
        ("test_layer.py::test_where_one_layer_is_full_none_is_taken",),
    ),
    Mutation(
        "1. Who waits holds nothing",
        "a waiter takes a place of its own layer along",
        "        self._queue(leaf, ticket.number)\n",
        "        leaf.room -= 1\n        self._queue(leaf, ticket.number)\n",
        ("test_upstream.py::test_a_waiter_for_the_global_layer_never_shows_as_using_its_own",),
    ),
    # --------------------------------------------------------------------------------- 2. the line
    Mutation(
        "2. The oldest goes first",
        "hand to the newest",
        "        heappush(node.heap, number)\n        # Those who left",
        "        node.heap.insert(0, number)\n        # Those who left",
        (
            "test_layer.py::test_siblings_are_served_in_the_order_of_their_coming",
            "test_upstream.py::test_the_global_layer_serves_kinds_and_agents_in_the_order_of_their_coming",
        ),
    ),
    Mutation(
        "2. ... skipping the blocked",
        "a newcomer with room stands behind those without",
        "        if full is None:\n            self._admit(leaf, ticket)\n",
        "        if full is None and not self.line:\n            self._admit(leaf, ticket)\n",
        ("test_upstream.py::test_a_backlog_of_one_kind_takes_neither_the_others_room_nor_the_global_budget",),
    ),
    Mutation(
        "2. ... and only the blocked",
        "a full layer offers its oldest waiter to its parent",
        "offer = self._oldest(node) if node.room > 0 else None",
        "offer = self._oldest(node)",
        ("test_load.py::test_no_limit_is_ever_passed",),
    ),
    Mutation(
        "2. A freed place is handed to its waiter",
        "a place that comes back is left to whoever comes",
        "return not (self.line or self.drains",
        "return not (self.drains",
        (
            "test_upstream.py::test_a_try_between_a_release_and_the_waiters_waking_fails",
            "test_layer.py::test_a_place_given_back_goes_to_who_waits_not_to_who_comes",
        ),
    ),
    Mutation(
        "2. ... and wakes it",
        "a grant opens no gate",
        "            self.after.append(ticket.gate)\n            for node in path(ticket.leaf):\n",
        "            for node in path(ticket.leaf):\n",
        ("test_permit.py::test_a_permit_released_elsewhere_serves_the_next_in_line",),
    ),
    Mutation(
        "2. Who resumes keeps its place in line",
        "a resume stands at the end",
        "        if newcomer:\n            # Straight line.\n",
        "        if not newcomer:\n            del self.away[ticket.number]\n        if True:\n",
        (
            "test_permit.py::test_who_resumes_goes_before_newcomers_and_the_oldest_first",
            "test_upstream.py::test_a_resumed_operation_goes_before_newcomers",
        ),
    ),
    Mutation(
        "2. A waiter that times out leaves no trace",
        "it stays in line",
        "        self._give_back(leaf, ticket)\n        return refusal\n",
        "        return refusal\n",
        ("test_governor.py::test_a_timeout_ends_the_wait_not_before_its_time_and_leaves_no_trace",),
    ),
    Mutation(
        "2. ... as does a request that is cancelled",
        "it stays in line",
        "                permit.release()\n                ticket = permit._ticket\n",
        "                ticket = permit._ticket\n",
        ("test_request.py::test_cancelling_leaves_the_line_to_those_behind",),
    ),
    Mutation(
        "2. ... and lets the next through",
        "its layer offers nobody in its place",
        "                self._offer(leaf)\n        if self.drains:\n",
        "        if self.drains:\n",
        ("test_upstream.py::test_the_first_in_line_leaving_lets_the_next_through_at_once",),
    ),
    Mutation(
        "2. ... unless the grant came first",
        "a grant that meets a timeout is thrown away",
        "        if ticket.state is HELD or ticket.state is OUT:\n",
        "        if ticket.state is OUT:\n",
        ("test_upstream.py::test_a_permit_granted_just_as_its_waiter_times_out_is_not_lost",),
    ),
    # ------------------------------------------------------------------------------ 3. exact books
    Mutation(
        "3. `stats()` is one moment",
        "the layers are counted one after the other",
        "self._settled(self._usage, nodes[0], nodes)\n",
        "[self._settled(self._usage, it, (it,))[0] for it in nodes]\n",
        ("test_load.py::test_every_snapshot_balances_under_load",),
    ),
    Mutation(
        "3. `available` is never below 0",
        "limit less use",
        "        return max(0, limit - used)\n",
        "        return limit - used\n",
        ("test_layer.py::test_shrinking_revokes_nothing_and_holds_as_places_come_back",),
    ),
    Mutation(
        "3. Who is granted waits no more",
        "it is still counted as waiting",
        "                node.room -= 1\n                node.waiting -= 1\n",
        "                node.room -= 1\n",
        ("test_upstream.py::test_who_waited_for_one_layer_is_counted_once_in_each",),
    ),
    # --------------------------------------------------------------------------- 4. nothing is lost
    Mutation(
        "4. A permit gives back all that it took",
        "the global place stays taken",
        "            root.room += 1\n",
        "",
        ("test_permit.py::test_a_permit_holds_one_of_its_kind_until_its_block_ends",),
    ),
    Mutation(
        "4. ... once",
        "a second release gives back again",
        "        if tree.calm and ticket.state is HELD and root is not None:\n"
        "            ticket.state = OUT\n"
        "            del tree.held[ticket.number]\n",
        "        if tree.calm and root is not None:\n            ticket.state = OUT\n"
        "            tree.held.pop(ticket.number, None)\n",
        ("test_permit.py::test_a_permit_is_given_back_once_however_many_threads_release_it",),
    ),
    Mutation(
        "4. A dropped permit comes back",
        "a permit has no finalizer",
        "        self._ticket = self.__del__ = ticket = Ticket()\n",
        "        self._ticket = ticket = Ticket()\n        self.__del__ = nothing\n",
        ("stress/test_collector.py::test_a_dropped_permit_is_back_at_once_and_warned_about",),
    ),
    Mutation(
        "4. ... before the warning",
        "warn first",
        "                tree.after.append(self)\n                tree.serve(wait=False)\n",
        "                self._warn('dropped unreleased', ResourceWarning, source=self)\n"
        "                tree.after.append(self)\n                tree.serve(wait=False)\n",
        ("stress/test_collector.py::test_a_permit_is_given_back_before_the_warning",),
    ),
    Mutation(
        "4. ... which says where it was acquired",
        "warn without the source",
        "                    source=self,\n",
        "",
        (
            "stress/test_collector.py"
            "::test_the_warning_says_where_the_permit_was_acquired_when_tracemalloc_is_on",
        ),
    ),
    Mutation(
        "4. A finalizer waits for no lock",
        "it does",
        "                tree.after.append(self)\n                tree.serve(wait=False)\n",
        "                tree.after.append(self)\n                tree.serve()\n",
        (
            "stress/test_collector.py"
            "::test_a_permit_dropped_while_another_thread_has_the_lock_is_given_back_by_that_thread",
        ),
    ),
    # ---------------------------------------------------------------------------- 5. interruptible
    Mutation(
        "5. The books are right after an interrupt",
        "a step does not say that it has begun",
        "            self.dirty = leaf\n            result = step(leaf, *args)\n",
        "            result = step(leaf, *args)\n",
        ("stress/test_interrupts.py::test_an_interrupt_anywhere_is_repaired_at_once",),
    ),
    Mutation(
        "5. ... nobody is asleep beside a free place",
        "what was left to be done is left at an interrupt",
        "        except BaseException:\n            self.serve()\n            raise\n",
        "        except BaseException:\n            raise\n",
        ("stress/test_interrupts.py::test_an_interrupt_anywhere_is_repaired_at_once",),
    ),
    Mutation(
        "5. ... no ghost is in line",
        "an interrupted wait does not note its ticket",
        "    except BaseException:\n        tree.after.append(ticket)\n        tree.serve()\n"
        "        tree.tell_cancelled(ticket)\n        raise\n    if refusal is not None:\n        try:\n",
        "    except BaseException:\n        raise\n    if refusal is not None:\n        try:\n",
        (
            "test_upstream.py::test_a_waiter_cancelled_in_the_line_leaves_no_ghost",
            "stress/test_interrupts.py::test_an_interrupt_anywhere_is_repaired_at_once",
        ),
    ),
    Mutation(
        "5. ... no lock is left taken",
        "an interrupted step keeps it",
        "            finally:\n                try:\n                    lock.release()\n"
        "                except RuntimeError:\n                    pass  # not taken yet, or free again\n",
        "            finally:\n                pass\n",
        ("stress/test_interrupts.py::test_an_interrupt_anywhere_is_repaired_at_once",),
    ),
    Mutation(
        "5. ... and none after several, when the next operation is over",
        "who finds dirt does not repair it",
        "            if self.dirty is not None:\n                self._rebuild()\n"
        "            self.calm = False\n",
        "            self.calm = False\n",
        ("stress/test_interrupts.py::test_a_second_interrupt_anywhere_is_repaired_by_the_next_operation",),
    ),
    Mutation(
        "5. An interrupted resume is not held",
        "its ticket stays where it is",
        "        except BaseException:\n            _give_back(tickets)\n"
        "            for ticket in tickets:\n",
        "        except BaseException:\n            for ticket in tickets:\n",
        ("test_upstream.py::test_an_operation_cancelled_as_it_resumes_leaves_no_ghost_and_is_not_held",),
    ),
    Mutation(
        "5. A wait can be interrupted at once",
        "it swallows what interrupts it",
        "        return bool(gate.acquire())\n",
        "        while True:\n            try:\n                return bool(gate.acquire())\n"
        "            except BaseException:\n                pass\n",
        ("test_snippets.py::test_the_snippets_of_a_page_run[docs/design.md]",),
    ),
    # --------------------------------------------------------------------------------- 6. circles
    Mutation(
        "6. A wait that closes a circle raises",
        "nobody looks when a thread is about to wait",
        "        if (circle := self._circle(ticket)) is not None:\n",
        "        if (circle := None) is not None:\n",
        ("test_deadlock.py::test_a_thread_that_waits_for_itself_is_told_at_once",),
    ),
    Mutation(
        "6. ... or a `resize` that does",
        "nobody looks after a resize",
        "        if self._break_circles():\n",
        "        if False:\n",
        ("test_deadlock.py::test_a_resize_that_closes_a_circle_tells_the_youngest",),
    ),
    Mutation(
        "6. Never where a permit may come back",
        "the stacks are not looked at",
        "inside = [it for it in owned if it.owner and is_inside(it.frame, it.entry, frames.get(it.owner))]",
        "inside = owned",
        ("test_deadlock.py::test_a_permit_entered_in_a_generator_that_moved_on_may_come_back",),
    ),
    Mutation(
        "6. ... as one entered by a mere call",
        "what was entered in any way counts",
        '            return name == "BEFORE_WITH" or (name == "CALL" and before == "LOAD_SPECIAL")\n',
        "            return True\n",
        ("test_deadlock.py::test_a_permit_entered_by_a_call_may_come_back",),
    ),
    Mutation(
        "6. ... or where one holder goes on",
        "one holder that is stuck is enough",
        "if 0 < limits[layer] <= kept[layer]]",
        "if 0 < limits[layer] and kept[layer]]",
        ("test_deadlock.py::test_a_layer_of_many_is_stuck_only_when_all_its_holders_are",),
    ),
    Mutation(
        "6. ... or a wait has an end",
        "a wait with a timeout counts",
        "ticket.waiter = get_ident() if timeout is None else None",
        "ticket.waiter = get_ident()",
        ("test_deadlock.py::test_a_wait_with_a_timeout_is_no_circle",),
    ),
    Mutation(
        "6. ... or a thread does more than wait",
        "a signal handler amid a wait is overlooked",
        "        if frame.f_code is Tree.wait.__code__:\n            return True\n"
        "        frame = frame.f_back\n    return False\n",
        "        if frame.f_code is Tree.wait.__code__:\n            return True\n"
        "        frame = frame.f_back\n    return True\n",
        ("test_deadlock.py::test_a_thread_that_runs_a_signal_handler_amid_its_wait_does_not_only_wait",),
    ),
    Mutation(
        "6. ... or a layer is paused",
        "a limit of 0 counts as one of 1",
        "limits = {node: node.limit for nodes in paths.values() for node in nodes}",
        "limits = {node: max(1, node.limit) for nodes in paths.values() for node in nodes}",
        ("test_deadlock.py::test_a_layer_at_0_is_paused_and_not_stuck",),
    ),
    Mutation(
        "6. ... or the circle is one of others",
        "who waits for it is told, too",
        "    if _full(waits[me], _stuck(others, owns, limits), owns, limits):\n",
        "    if False:\n",
        ("test_deadlock.py::test_who_waits_for_a_circle_of_others_is_not_in_it",),
    ),
    # ------------------------------------------------------------------------------------- 7. close
    Mutation(
        "7. `close()` wakes every waiter",
        "who is in line stays there",
        "            if ticket.state is WAITING and is_closed(ticket.leaf):\n",
        "            if False:\n",
        ("test_governor.py::test_closing_wakes_every_waiter_and_leaves_the_held_alone",),
    ),
    Mutation(
        "7. ... refuses newcomers",
        "an acquire is let in",
        "            if newcomer and node.closed:\n",
        "            if False:\n",
        ("test_governor.py::test_a_closed_governor_refuses_newcomers",),
    ),
    Mutation(
        "7. ... also those who try",
        "a try looks only for room",
        "            if node.room <= 0 or node.closed:\n",
        "            if node.room <= 0:\n",
        ("test_governor.py::test_a_closed_governor_refuses_newcomers",),
    ),
    Mutation(
        "7. ... and below it",
        "an agent's agent does not look above",
        "(middle.room > 0 and not middle.closed)",
        "middle.room > 0",
        ("test_layer.py::test_closing_wakes_every_waiter_below_and_refuses_newcomers",),
    ),
    Mutation(
        "7. What is held stays valid",
        "to close is to take it back",
        "        leaves.update(ticket.leaf for ticket in self.held.values())\n",
        "        for number, ticket in list(self.held.items()):\n"
        "            if is_closed(ticket.leaf):\n                ticket.state = OUT\n"
        "                del self.held[number]\n"
        "        leaves.update(ticket.leaf for ticket in self.held.values())\n",
        ("test_permit.py::test_a_permit_outlives_the_close_of_its_governor",),
    ),
    Mutation(
        "7. Who is suspended may resume",
        "it is refused as a newcomer is",
        "            if newcomer and node.closed:\n",
        "            if node.closed:\n",
        ("test_permit.py::test_who_resumes_is_not_refused_by_a_closed_governor",),
    ),
    Mutation(
        "7. ... also who is in line for it",
        "it is turned out as others are",
        "            if ticket.state is WAITING and is_closed(ticket.leaf):\n",
        "            if is_closed(ticket.leaf):\n",
        ("test_permit.py::test_who_waits_to_resume_stays_in_line_when_the_governor_closes",),
    ),
    # -------------------------------------------------------------------------------------- 8. fork
    Mutation(
        "8. A child has its full limits",
        "it keeps the parent's books",
        "    for tree in trees():\n        tree._forget()\n",
        "    for tree in trees():\n        tree.lock = RLock()\n",
        ("stress/test_fork.py::test_permits_held_across_a_fork_are_inert_in_the_child",),
    ),
    Mutation(
        "8. ... and nobody in line",
        "it keeps the parent's line",
        "        self.held, self.line, self.away, self.drains = {}, {}, {}, {}\n",
        "        self.held, self.away, self.drains = {}, {}, {}\n",
        ("stress/test_fork.py::test_a_larger_limit_in_the_child_admits_nobody_of_the_parents_line",),
    ),
    Mutation(
        "8. ... also when another thread was inside",
        "it keeps the parent's lock",
        "        self.calm = self._is_calm()\n        self.lock = RLock()\n",
        "        self.calm = self._is_calm()\n",
        ("stress/test_fork.py::test_a_fork_while_another_thread_is_inside_leaves_no_lock_taken",),
    ),
    Mutation(
        "8. Permits of the parent are inert",
        "they are still held",
        "            ticket.state = OUT\n            for node in path(ticket.leaf):\n"
        "                node.clear()\n",
        "            for node in path(ticket.leaf):\n                node.clear()\n",
        ("stress/test_fork.py::test_permits_held_across_a_fork_are_inert_in_the_child",),
    ),
    Mutation(
        "8. A deep copy of a governor is the governor",
        "it is another one",
        "    def __deepcopy__(self, memo: dict[int, Any]) -> Self:\n        return self\n",
        "    def __deepcopy__(self, memo: dict[int, Any]) -> Self:\n"
        "        return self.__class__.with_defaults()\n",
        ("test_governor.py::test_a_copy_of_a_governor_is_the_governor",),
    ),
    Mutation(
        "8. To pickle it says what to do",
        "it says only no",
        '            "make one in each process, for example with ConcurrencyGovernor.shared()"\n',
        '            ""\n',
        ("test_governor.py::test_a_governor_is_not_pickled_and_says_what_to_do",),
    ),
    # ------------------------------------------------------------------------------------- 9. cheap
    Mutation(
        "9. An uncontended acquire is short",
        "each goes the long way",
        "        if tree.calm and root is not None and leaf.room > 0",
        "        if not tree and root is not None and leaf.room > 0",
        ("test_cost.py::test_an_uncontended_block_takes_the_short_way_in_and_out",),
    ),
    Mutation(
        "9. Who waits does not poll",
        "it looks a hundred times a second",
        "        return bool(gate.acquire())\n",
        "        while not gate.acquire(True, 0.01):\n            pass\n        return True\n",
        ("test_cost.py::test_who_waits_sleeps_until_it_is_woken",),
    ),
    Mutation(
        "9. A grant costs the same however many agents",
        "all is derived anew at each",
        "            self._grant(nodes[-1])\n",
        "            self._rebuild()\n",
        ("test_cost.py::test_a_hand_over_takes_as_many_steps_among_a_thousand_agents_as_among_ten",),
    ),
]


def run(mutation: Mutation | None, tests: tuple[str, ...]) -> str:
    """Run tests in a copy of the tree, changed by the mutation. Returns how that ended."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as place:
        copy = Path(place)
        for name in ("governor", "tests", "examples", "docs"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, copy)
        if mutation is not None:
            file = copy / source_of(mutation.old).relative_to(ROOT)
            text = file.read_text("utf-8")
            file.write_text(text.replace(mutation.old, mutation.new), "utf-8")
        # `-m pytest` puts the place where it runs first: it is the copy that is imported.
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
        try:
            done = subprocess.run(
                [*command, *(f"tests/{test}" for test in tests)],
                cwd=copy,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            return "hung"
    if "+ Timeout +" in done.stdout + done.stderr:
        return "hung"
    if done.returncode == 1:
        return "failed"
    return "passed" if done.returncode == 0 else f"not run:\n{done.stdout}{done.stderr}"


def main(wanted: list[str]) -> int:
    """Run the mutations, and print the table."""
    chosen = [it for it in MUTATIONS if not wanted or any(word in it.part for word in wanted)]
    whole = run(None, tuple(dict.fromkeys(test for it in chosen for test in it.tests)))
    if whole != "passed":
        print(f"the tests do not pass as it is: {whole}", file=sys.stderr)
        return 2
    unnoticed = 0
    for mutation in chosen:
        began = time.monotonic()
        result = run(mutation, mutation.tests)
        unnoticed += result not in ("failed", "hung")
        print(f"{row(mutation)} {result} |", flush=True)
        print(f"    {time.monotonic() - began:.0f} s", file=sys.stderr)
    print(f"{len(chosen)} mutations, {unnoticed} unnoticed", file=sys.stderr)
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
