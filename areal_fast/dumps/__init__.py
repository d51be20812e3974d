"""Dump files after the fact: `areal-fast dumps list|show|verify|export`. Needs no proxy, no engine, no torch.

The files are read as what anybody may have put there: nothing in them is believed before it was looked at,
and whatever is wrong with one is a line about that file, never a traceback and never the end of the run.
"""

from areal_fast.dumps.commands import main

__all__ = ["main"]
