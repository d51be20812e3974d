"""A process in one life of it, as records name it: who tells a callback server, who recorded a chat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from areal_fast.protocol import records as rec

if TYPE_CHECKING:
    from areal_fast.core._core import Arena


def courier_of(arena: Arena) -> int:
    """This process as a courier."""
    return rec.courier_word(arena.proc, arena.proc_info(arena.proc)[1])


def lives(arena: Arena, courier: int) -> bool:
    """Whether the process is still in the life that took the courier's work. UNCLAIMED does not live."""
    if courier == rec.UNCLAIMED:
        return False
    proc, incarnation = rec.courier_process(courier)
    pid, current, _ = arena.proc_info(proc)
    return pid != 0 and current & ((1 << 56) - 1) == incarnation
