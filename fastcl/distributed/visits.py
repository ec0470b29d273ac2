"""Which rank works on which pairs of shards, and how the columns come to it and their results go home.

A rank visits the columns of its peers with its own rows. Across views every rank visits everybody. With itself, a pair of shards
is visited by one of its two ranks, which works out the results of both: rank k meets k - 1, k - 2, ... for half the ring; where
the world is even, the two ranks furthest apart divide the rows of the one of them with the larger rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..precision import stacked
from .wire import Columns, Wire

Work = Callable[["Visit", Columns], Columns]  # results for the columns; those for own rows it keeps
Join = Callable[[Columns, Columns], Columns]  # two partial results of the same columns
Blank = Callable[[int], Columns]  # results of so many columns before any visit


@dataclass(frozen=True)
class Piece:
    """Rows start to stop of a peer's shard."""

    peer: int
    start: int
    stop: int


@dataclass(frozen=True)
class Visit:
    """Own rows start to stop against the pieces, one after the other; `own` says whether own columns are all there is."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]
    own: bool = False

    def before(self, peer: int) -> int | None:
        """How many columns come before those of the peer, None where the peer has none here."""
        passed = 0
        for piece in self.pieces:
            if piece.peer == peer:
                return passed
            passed += piece.stop - piece.start
        return None


def schedule(rank: int, rows: Sequence[int], columns: Sequence[int] | None, together: bool) -> list[Visit]:
    """The visits of a rank, in order.

    Args:
        rank: whose visits.
        rows: of x, of each rank.
        columns: rows of y of each rank; None for x with itself.
        together: whether all columns are there at once, so that visits with the same own rows become one.
    """
    world, n = len(rows), rows[rank]
    if columns is not None:
        whole = [Piece(peer, 0, m) for peer, m in enumerate(columns)]
        if together:
            # Rows beyond own columns have no partner: on the diagonal they would meet the columns of the next rank.
            paired = min(n, columns[rank])
            return [Visit(a, b, tuple(whole)) for a, b in ((0, paired), (paired, n)) if b > a or a == 0]
        return [Visit(0, n, (whole[(rank - step) % world],), own=step == 0) for step in range(world)]
    own = Visit(0, n, (Piece(rank, 0, n),), own=True)
    met = [(rank - step) % world for step in range(1, (world + 1) // 2)]
    pieces = [Piece(peer, 0, rows[peer]) for peer in met]
    visits = [Visit(0, n, tuple(pieces))] if together and pieces else [Visit(0, n, (piece,)) for piece in pieces]
    if world % 2 == 0:
        visits.append(_divided(rank, (rank - world // 2) % world, rows))
    return [own, *visits]


def _divided(rank: int, peer: int, rows: Sequence[int]) -> Visit:
    """The smaller rank takes the first half of the larger one's rows, the larger rank meets it with its second half."""
    half = rows[max(rank, peer)] // 2
    if rank < peer:
        return Visit(0, rows[rank], (Piece(peer, 0, half),))
    return Visit(half, rows[rank], (Piece(peer, 0, rows[peer]),))


@dataclass(frozen=True)
class Tour:
    """All visits of one reduction, of every rank.

    Args:
        wire: the ranks.
        rows: of x, of each rank.
        columns: rows of y, of each rank; None for x with itself.
        ring: whether shards pass from rank to rank; otherwise all are gathered.
    """

    wire: Wire
    rows: tuple[int, ...]
    columns: tuple[int, ...] | None
    ring: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the shards that travel."""
        return self.rows if self.columns is None else self.columns

    def visits(self, rank: int) -> list[Visit]:
        """Of any rank."""
        return schedule(rank, self.rows, self.columns, together=not self.ring)

    def make(self, columns: Columns, work: Work, blank: Blank, join: Join) -> Columns:
        """Make all visits; return the joined results of own columns (no columns of results: nothing goes home)."""
        if not blank(0):
            return self._visit_only(columns, work)
        return self._around(columns, work, blank, join) if self.ring else self._gathered(columns, work, blank, join)

    def _visit_only(self, columns: Columns, work: Work) -> Columns:
        nothing: Blank = lambda rows: ()  # noqa: E731
        if self.ring:
            return self._around(columns, work, nothing, lambda a, b: ())
        everything = self.wire.gathered(columns, self.sizes)
        for visit in self.visits(self.wire.rank):
            work(visit, self._select(visit, everything, columns))
        return ()

    def _select(self, visit: Visit, everything: Columns, own: Columns) -> Columns:
        """The columns of a visit, out of those of all ranks."""
        if visit.own:
            return own
        if len(visit.pieces) == self.wire.world:
            return everything
        starts = _starts(self.sizes)
        at = [(starts[p.peer] + p.start, starts[p.peer] + p.stop) for p in visit.pieces]
        return tuple(stacked(*(t[a:b] for a, b in at)) if len(at) > 1 else t[at[0][0] : at[0][1]] for t in everything)

    def _gathered(self, columns: Columns, work: Work, blank: Blank, join: Join) -> Columns:
        wire = self.wire
        everything = wire.gathered(columns, self.sizes)
        kept = None
        away: dict[int, Columns] = {}
        for visit in self.visits(wire.rank):
            found = work(visit, self._select(visit, everything, columns))
            if visit.own:
                kept = found
                continue
            lengths = [piece.stop - piece.start for piece in visit.pieces]
            for piece, part in zip(visit.pieces, zip(*(t.split(lengths) for t in found), strict=True), strict=True):
                away[piece.peer] = join(away[piece.peer], part) if piece.peer in away else part
        mine = {
            k: piece
            for k in range(wire.world)
            for visit in self.visits(k)
            for piece in visit.pieces
            if piece.peer == wire.rank and not visit.own
        }
        like = blank(0)
        back = [mine[k].stop - mine[k].start if k in mine else 0 for k in range(wire.world)]
        received = wire.home([away.get(k, like) for k in range(wire.world)], back, like)
        result = blank(self.sizes[wire.rank])
        if kept:
            result = join(result, kept)
        for k, piece in sorted(mine.items()):
            result = _join_piece(result, received[k], piece, join)
        return result

    def _around(self, columns: Columns, work: Work, blank: Blank, join: Join) -> Columns:
        wire, visits = self.wire, self.visits(self.wire.rank)
        last = len(visits) - 1
        here, results = columns, blank(self.sizes[wire.rank])
        arriving: Callable[[], Columns] | None = None
        for step, visit in enumerate(visits):
            (piece,) = visit.pieces
            behind = self.sizes[(wire.rank - step - 1) % wire.world]
            coming = wire.shift(here, 1, behind) if step < last else None
            inside = (
                here if piece.stop - piece.start == len(here[0]) else tuple(t[piece.start : piece.stop] for t in here)
            )
            found = work(visit, inside)
            if arriving is not None:
                results = arriving()
            if found:
                results = _join_piece(results, found, piece, join)
            if step < last and results:
                arriving = wire.shift(results, 1, behind)
            here = coming() if coming is not None else here
        return wire.shift(results, -last, self.sizes[wire.rank])() if results else ()


def _join_piece(results: Columns, found: Columns, piece: Piece, join: Join) -> Columns:
    if piece.stop - piece.start == len(results[0]):
        return join(results, found)
    joined = join(tuple(t[piece.start : piece.stop] for t in results), found)
    copies = tuple(t.clone() for t in results)
    for t, part in zip(copies, joined, strict=True):
        t[piece.start : piece.stop] = part
    return copies


def _starts(sizes: Sequence[int]) -> list[int]:
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    return starts
