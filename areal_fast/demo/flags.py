"""The demo's command line, apart from what imports torch, so that help and usage errors are quick."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The demo's command line."""
    parser = argparse.ArgumentParser(
        prog="areal-fast demo",
        description="A day in the proxy's life at small scale, on the embedded engine. Checks itself: exit "
        "status 0 means that every answer an agent received was found again exactly once.",
    )
    parser.add_argument("--agents", type=int, default=24, help="concurrent agents (24)")
    parser.add_argument("--seconds", type=float, default=16.0, help="how long they begin new episodes (16)")
    parser.add_argument("--workers", type=int, default=2, help="the proxy's worker processes, at least 2 (2)")
    parser.add_argument("--session-timeout-seconds", type=float, default=6.0, help="until stale (6)")
    parser.add_argument("--seed", type=int, default=None, help="of the agents' choices (random, printed)")
    parser.add_argument("--folder", type=Path, help="new folder for dumps and log (a temporary one, kept)")
    args = parser.parse_args(argv)
    if args.agents < 2 or args.workers < 2 or args.seconds < 1 or args.session_timeout_seconds < 1:
        parser.error("at least 2 agents, 2 workers, 1 second and a session timeout of 1 second")
    if args.folder is not None and args.folder.exists() and any(args.folder.iterdir()):
        parser.error(f"--folder: {args.folder} is not empty")
    return args
