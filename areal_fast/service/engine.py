"""The embedded engine as the supervisor's child: the same program, tied to the supervisor's life.

It leaves when its standard input ends; PR_SET_PDEATHSIG takes it along even while it is stopped.
"""

from __future__ import annotations

import sys

from areal_fast.embedded.__main__ import main as embedded
from areal_fast.service.child import die_with_parent


def main() -> None:
    """`python -m areal_fast.service.engine SUPERVISOR_PID` and the flags of `areal-fast embedded`."""
    die_with_parent(int(sys.argv[1]))
    sys.exit(embedded(sys.argv[2:]))


if __name__ == "__main__":
    main()
