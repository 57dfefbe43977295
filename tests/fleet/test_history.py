"""The checker of histories finds what is against the rules, and nothing else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from fleet.history import History, Verdict, check

LIMITS = {"": 2, "tool/": 1, "tool/coder/": 1}


def verdict(path: Path, *lines: str, **options: tuple[str, ...]) -> Verdict:
    path /= "history"
    path.write_text("".join(f"{line}\n" for line in lines))
    return check([path], LIMITS, **options)


def test_turns_one_after_the_other_are_well(tmp_path: Path) -> None:
    found = verdict(
        tmp_path,
        "10 grant 1 tool/ 7",
        "20 grant 2 stream/ 8",
        "30 release 1 tool/ 7",
        "30 grant 3 tool/coder/ 8",
        "40 release 2 stream/ 8",
        "50 release 3 tool/coder/ 8",
        ordered=("tool/",),
    )
    assert found.violations == []
    assert found.peaks == {"": 2, "tool/": 1, "tool/coder/": 1}
    assert found.grants == {7: 1, 8: 2}
    assert found.share == 0.5
    assert (found.unfinished, found.lost) == ([], 0)


def test_one_too_many_at_the_same_time_is_found(tmp_path: Path) -> None:
    found = verdict(
        tmp_path,
        "10 grant 1 tool/ 7",
        "29 grant 2 tool/coder/ 8",
        "30 release 1 tool/ 7",
        "40 release 2 tool/coder/ 8",
    )
    assert found.violations == ["layer 'tool/': 2 held of 1, at 29: 1 of 7, 2 of 8"]


def test_a_full_layer_is_found_in_the_histories_of_several_processes(tmp_path: Path) -> None:
    files = []
    for number in (1, 2, 3):
        files.append(tmp_path / str(number))
        lines = f"{number} grant {number} stream/ {number}", f"9 release {number} stream/ {number}"
        files[-1].write_text("\n".join(lines))
    assert check(files, LIMITS).violations == ["layer '': 3 held of 2, at 3: 1 of 1, 2 of 2, 3 of 3"]
    assert check(files[1:], LIMITS).violations == []


def test_a_number_that_was_granted_twice_is_found(tmp_path: Path) -> None:
    found = verdict(
        tmp_path,
        "10 grant 1 stream/ 7",
        "20 release 1 stream/ 7",
        "30 grant 1 stream/ 8",
        "40 release 1 stream/ 8",
    )
    assert found.violations == ["1 was granted to 7, and again to 8"]


def test_what_is_given_back_without_having_been_had_is_found(tmp_path: Path) -> None:
    found = verdict(tmp_path, "10 grant 1 tool/ 7", "20 release 1 tool/ 7", "30 release 1 tool/ 7")
    assert found.violations == ["release by 7 of 1, which it did not have"]
    found = verdict(tmp_path, "20 lost 1 tool/ 7")
    assert found.violations == ["lost by 7 of 1, which it did not have"]


def test_what_was_never_given_back_is_told_and_counts_to_the_end(tmp_path: Path) -> None:
    found = verdict(tmp_path, "10 grant 1 tool/ 7", "20 grant 2 tool/ 8", "30 release 2 tool/ 8")
    assert found.unfinished == [1]
    assert len(found.violations) == 1


def test_a_killed_process_has_nothing_from_then_on(tmp_path: Path) -> None:
    lines = ["10 grant 1 tool/ 7", "20 killed - - 7", "30 grant 2 tool/ 8", "40 release 2 tool/ 8"]
    found = verdict(tmp_path, *lines)
    assert found.violations == []
    assert found.unfinished == []
    lines[1] = "31 killed - - 7"
    assert verdict(tmp_path, *lines).violations == ["layer 'tool/': 2 held of 1, at 30: 1 of 7, 2 of 8"]


def test_a_lost_permit_counts_for_as_long_as_it_was_known_to_be_good(tmp_path: Path) -> None:
    lines = [
        "10 grant 1 tool/ 7",
        "20 held 1 tool/ 7",
        "25 grant 2 tool/ 8",
        "30 release 2 tool/ 8",
        "40 lost 1 tool/ 7",
    ]
    found = verdict(tmp_path, *lines)
    assert found.violations == []
    assert found.lost == 1
    lines[1] = "26 held 1 tool/ 7"
    assert len(verdict(tmp_path, *lines).violations) == 1


def test_who_came_out_of_order_where_there_is_one_place_is_found(tmp_path: Path) -> None:
    lines = ["10 grant 2 tool/ 7", "20 release 2 tool/ 7", "30 grant 1 tool/ 8", "40 release 1 tool/ 8"]
    assert verdict(tmp_path, *lines).violations == []
    found = verdict(tmp_path, *lines, ordered=("tool/",))
    assert found.violations == ["layer 'tool/': 2 came before 1"]


def test_an_unknown_event_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such event: taken"):
        verdict(tmp_path, "10 grant 1 tool/ 7", "20 taken 1 tool/ 7")


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "history"
    history = History(path)
    good, lost = SimpleNamespace(fence=1, lost=False), SimpleNamespace(fence=2, lost=True)
    history.grant(good, "tool/")
    assert not history.release(good, "tool/")
    history.grant(lost, "tool/coder/")
    assert history.release(lost, "tool/coder/")
    history.killed(1)
    history.close()
    found = check([path], LIMITS)
    assert found.violations == []
    assert (found.grants.total(), found.lost) == (2, 1)
