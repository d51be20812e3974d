"""A second process on the same arena, driven call by call, and killed whenever a test likes.

The child is this file run as a program: fork+exec with the arena's fd inherited. It reads one call a line,
`(name, args, kwargs)` as a Python literal, and answers with one line: `("ok", result)` or `("error",
class, text)`. A call that kills the child (an armed crash point) ends its output: ChildDied.
"""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class ChildDied(Exception):
    """The child ended instead of answering; `status` is its exit status (-9: SIGKILL)."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the child ended with status {status}")
        self.status = status


class ChildError(Exception):
    """The call raised in the child; `kind` is the exception's class name."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class ArenaChild:
    def __init__(self, fd: int, proc: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.children", str(fd), str(proc)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(fd,),
            cwd=ROOT,
            text=True,
        )
        self.pid = self.process.pid

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The result of `arena.name(*args, **kwargs)` there."""
        self.send(name, *args, **kwargs)
        return self.answer()

    def send(self, name: str, *args: Any, **kwargs: Any) -> None:
        assert self.process.stdin is not None
        print(repr((name, args, kwargs)), file=self.process.stdin, flush=True)

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ChildDied(self.process.wait())
        answer = ast.literal_eval(line)
        if answer[0] == "error":
            raise ChildError(answer[1], answer[2])
        return answer[1]

    def kill(self) -> None:
        """SIGKILL, and wait until it is certain."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def main() -> None:
    from areal_fast.core import _core

    arena = _core.Arena.attach(int(sys.argv[1]), int(sys.argv[2]))
    extra = {"crash_arm": _core.crash_arm, "fault_arm": _core.fault_arm, "getpid": os.getpid}
    for line in sys.stdin:
        name, args, kwargs = ast.literal_eval(line)
        try:
            result = extra[name](*args, **kwargs) if name in extra else getattr(arena, name)(*args, **kwargs)
            answer: tuple[Any, ...] = ("ok", tuple(result) if isinstance(result, tuple) else result)
        except Exception as e:
            answer = ("error", type(e).__name__, str(e))
        print(repr(answer), flush=True)


if __name__ == "__main__":
    main()
