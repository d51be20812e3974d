"""The log: one line an event, quoted where needed, harmless when nobody reads it."""

from __future__ import annotations

import os

import pytest

from areal_fast.service.log import PIPE_BUF, Log


def lines(read_fd: int) -> list[str]:
    os.set_blocking(read_fd, False)
    data = b""
    try:
        while chunk := os.read(read_fd, 1 << 16):
            data += chunk
    except BlockingIOError:
        pass
    return data.decode().splitlines()


@pytest.fixture
def pipe() -> tuple[int, int]:
    return os.pipe()


def test_one_line_an_event_whatever_is_in_it(pipe: tuple[int, int]) -> None:
    log = Log("worker-3", "info", pipe[1])
    log.info("dumped", session='a "b"\nc', size=12, ok=True, path=None, name="plain-0")
    (line,) = lines(pipe[0])
    assert f"INFO worker-3[{os.getpid()}] dumped" in line
    assert r'session="a \"b\"\nc" size=12 ok=yes name=plain-0' in line


def test_levels_and_that_a_notice_is_seen_by_default(pipe: tuple[int, int]) -> None:
    log = Log("x", "warning", pipe[1])
    log.debug("a")
    log.info("b")
    log.notice("c")
    log.warning("d")
    log.error("e")
    assert [line.split()[3] for line in lines(pipe[0])] == ["c", "d", "e"]


def test_a_long_line_is_cut_not_split(pipe: tuple[int, int]) -> None:
    Log("x", "info", pipe[1]).info("long", text="y" * 10_000)
    (line,) = lines(pipe[0])
    assert len(line) == PIPE_BUF - 1


def test_a_reader_that_stopped_reading_blocks_nobody(pipe: tuple[int, int]) -> None:
    log = Log("x", "info", pipe[1])
    for i in range(1000):
        log.info("event", i=i, text="z" * 1000)
    assert log.dropped > 0
    lines(pipe[0])
    log.info("again")
    assert log.dropped == 0
    (line,) = lines(pipe[0])
    assert "log_lines_dropped=" in line


def test_a_reader_that_went_away_harms_nobody(pipe: tuple[int, int]) -> None:
    log = Log("x", "info", pipe[1])
    os.close(pipe[0])
    log.info("event")
    assert log.dropped == 1
