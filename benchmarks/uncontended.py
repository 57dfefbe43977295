"""What going in and out costs where there is room for all."""

from __future__ import annotations

from benchmarks._measure import Contender, Effort, Row, absent, interleaved, loop, nothing
from benchmarks._peers import PEERS, Floor, GovernedWithListener, Peer, left_out

__all__ = ["uncontended"]

CASES = {"a tool, two layers": "tool", "a tool of an agent, three layers": "agent 0"}


def uncontended(effort: Effort) -> list[Row]:
    """One thread, room for all."""
    found = []
    for case, kind in CASES.items():
        layers = 3 if kind == "agent 0" else 2
        missing = left_out(layers=layers if layers > 2 else 1)
        peers: list[Peer] = [
            peer(4, 8, 16, agents=layers - 2, each=4)
            for peer in (*PEERS, GovernedWithListener, Floor)
            if peer.name not in missing
        ]
        contenders = {it.name: _contender(it, kind, layers, effort) for it in peers}
        found += interleaved("uncontended", case, contenders, rounds=effort.rounds(9), floor=Floor.name)
        found += absent("uncontended", case, missing)
        for it in peers:
            it.close()
    return found


def _contender(peer: Peer, kind: str, layers: int, effort: Effort) -> Contender:
    turns = effort.of(5_000, 200) // (20 if peer.slow else 1)
    return Contender(loop(lambda n: peer.run(kind, n, nothing), turns), peer.check, peer.remark(layers))
