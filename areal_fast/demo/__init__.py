"""`areal-fast demo`: a day in the proxy's life at small scale, on the embedded engine, that checks itself.

It starts the real proxy as a process and uses it only as its clients do: agents through the `openai`
client, a trainer that exports trajectories and fetches them as torch tensors, an operator who updates the
weights, and an accident: a worker process is killed. Sessions left alone go stale and are dumped. At the
end every answer that an agent was given must be found exactly once, token by token, in what the trainer
got or in a dump.

`flags` is its command line, `day` the timetable, `proxy` the process under test, `agents` and `trainer`
its users, `tensors` and `ledger` the book-keeping and the checks, `screen` and `report` what a
person sees. Nothing here is imported by the proxy; the demo imports nothing of it but its client, and
the byte tokenizer, to say which token ids a prompt must have become.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo. Exit status: 0 if everything held, 1 if a check failed, 2 for a bad command line."""
    from areal_fast.demo import flags

    args = flags.parse(argv)
    try:
        from areal_fast.demo import day
    except ModuleNotFoundError as error:
        if error.name not in ("openai", "torch"):
            raise
        print(f"the demo needs {error.name}: pip install 'areal-fast[demo]'", file=sys.stderr)
        return 1
    return day.run(args)
