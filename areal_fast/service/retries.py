"""Chats that were sent again because their first reply never arrived.

Rules: protocol/retries.py. Before a turn begins its twin is looked for: in the session's record, or, if the
first one is still with the engine in this worker and its client is gone (or the keys are equal), after it has
ended. A repeat that finds one is answered from the record, whole or streamed as it asks, under the same
interaction id; nothing is recorded for it, and what becomes of this reply is noted like that of the first.

A client that closed its sending side before the reply left is taken for gone: it nearly always is, and its
reply is then lost though the kernel took it.

A reply is noted as out just before it is handed over, and as lost afterwards if it was: so an answer that a
client has is never told again to an equal body that means a new sample. A worker killed between the record
and that note leaves one that is told again; one killed between the note and the kernel, a record that nobody
heard of and a client that asks anew.

What is not seen: a first one that is still in flight in another worker; its repeat is a sample of its own.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from areal_fast.core._messages import fingerprint
from areal_fast.protocol.retries import Asked
from areal_fast.store.couriers import courier_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from areal_fast.http import Exchange
    from areal_fast.store import Session, SessionStore


class Flight:
    """One chat that is with the engine and will be recorded, with `body_hash`; until it is told that it has
    `ended`."""

    __slots__ = ("_flights", "_landed", "body_hash", "exchange", "leaving", "one", "session")

    def __init__(
        self,
        session: Session,
        exchange: Exchange,
        one: Asked,
        process: int,
        flights: dict[int, list[Flight]],
    ) -> None:
        self.session = session
        self.exchange = exchange
        self.one = one
        self.body_hash = one.pack(process)
        self.leaving: Callable[[], None] | None = None
        self._flights = flights
        self._landed: asyncio.Future[None] | None = None  # only where a twin waits
        flights.setdefault(session.slot, []).append(self)

    def ended(self) -> None:
        slot = self.session.slot
        flights = self._flights[slot]
        flights.remove(self)
        if not flights:
            del self._flights[slot]
        if self._landed is not None:
            self._landed.set_result(None)

    async def landed(self) -> None:
        """Wait for its end."""
        if self._landed is None:
            self._landed = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._landed)

    def is_twin_of(self, one: Asked) -> bool:
        if one.key and one.key == self.one.key:
            return True
        return one == self.one and (self.exchange.gone or self.exchange.input_ended)

    def recorded(self, trajectory: int, ordinal: int) -> None:
        """It is: note what becomes of the reply."""
        self.leaving = watch(self.session, self.exchange, (trajectory, ordinal))


def watch(session: Session, exchange: Exchange, place: tuple[int, int]) -> Callable[[], None]:
    """Note what becomes of the reply of the interaction at (trajectory, ordinal). Call before it is complete;
    call the result just before the reply, or what completes it, is handed over."""
    note = session.fate(place)
    noted = False

    def leaving() -> None:
        nonlocal noted
        if not exchange.input_ended:
            noted = True
            note(True)

    def sent(arrived: bool) -> None:
        arrived = arrived and not exchange.input_ended
        if not (arrived and noted):
            note(arrived)

    exchange.on_sent(sent)
    return leaving


class Retries:
    """One worker's knowledge of chats in flight, and the way to those that are recorded."""

    def __init__(self, store: SessionStore) -> None:
        self._process = courier_of(store.arena)
        self._flights: dict[int, list[Flight]] = {}

    def asked(self, exchange: Exchange) -> Asked:
        """What the request is told apart by."""
        key = exchange.headers.get(b"idempotency-key")
        return Asked(fingerprint(exchange.body), fingerprint(key) if key else b"")

    def twin_in_flight(self, session: Session, one: Asked) -> Flight | None:
        """The first one, if it is still with the engine: wait for its end, and ask again."""
        for flight in self._flights.get(session.slot, ()):
            if flight.is_twin_of(one):
                return flight
        return None

    def flight(self, session: Session, exchange: Exchange, one: Asked) -> Flight:
        """This chat is with the engine from now on."""
        return Flight(session, exchange, one, self._process, self._flights)
