"""`areal-fast top [URL]`: what a running proxy does, in a terminal.

It asks /metrics and /health once an interval over one kept connection, and nothing else: a fraction of a
millisecond of one worker's time. Rates, quantiles and what is wrong are worked out here (view.py), drawn
without a terminal (picture.py), and put on one (terminal.py). No dependency beyond the standard library.
"""

from areal_fast.top.terminal import main

__all__ = ["main"]
