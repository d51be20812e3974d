"""The wheel against the plain thing: a table of deadlines looked through at every tick."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from areal_fast.http.wheel import _AHEAD, Wheel


class Item:
    def __init__(self, name: int, log: list[int]) -> None:
        self.due = 0
        self.filed = 0
        self._name = name
        self._log = log

    def expired(self) -> None:
        self._log.append(self._name)


step = st.one_of(
    st.tuples(st.just("set"), st.integers(0, 4), st.integers(1, 12)),
    st.tuples(st.just("clear"), st.integers(0, 4), st.just(0)),
    st.tuples(st.just("later"), st.integers(0, 4), st.integers(1, 12)),
    st.tuples(st.just("tick"), st.just(0), st.just(0)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(step, max_size=60))
def test_every_item_expires_at_its_tick_and_once(steps: list[tuple[str, int, int]]) -> None:
    async def main() -> None:
        wheel = Wheel(3600.0)
        expired: list[int] = []
        items = [Item(name, expired) for name in range(5)]
        deadlines: dict[int, int] = {}
        now = wheel.now
        for what, name, ticks in [*steps, *[("tick", 0, 0)] * 13]:
            if what == "set":
                wheel.set(items[name], ticks)
                deadlines[name] = now + ticks
            elif what == "clear":
                items[name].due = 0  # as the connection does: the entry is found stale at its tick
                deadlines.pop(name, None)
            elif what == "later":
                if deadlines.get(name, 1 << 30) <= now + ticks:
                    items[name].due = deadlines[name] = now + ticks
            else:
                expired.clear()
                wheel.advance()
                now += 1
                assert sorted(expired) == sorted(n for n, due in deadlines.items() if due == now)
                deadlines = {n: due for n, due in deadlines.items() if due > now}
        assert not deadlines
        wheel.stop()

    asyncio.run(main())


def test_the_timer_runs_only_while_something_is_filed() -> None:
    async def main() -> None:
        wheel = Wheel(0.001)
        expired: list[int] = []
        assert wheel._timer is None
        wheel.set(Item(1, expired), wheel.ticks(0.003))
        assert wheel._timer is not None
        while wheel._timer is not None:
            await asyncio.sleep(0.001)
        assert expired == [1]
        assert not wheel._buckets

    asyncio.run(asyncio.wait_for(main(), 20))


def test_what_is_over_is_soon_forgotten() -> None:
    async def turn() -> None:
        wheel, log = Wheel(1000.0), list[int]()
        item = Item(1, log)
        wheel.set(item, 5000)
        item.due = 0  # settled long before its time
        for _ in range(_AHEAD):
            wheel.advance()
        assert not wheel._buckets and log == []
        wheel.set(item, 3 * _AHEAD)
        for tick in range(3 * _AHEAD):
            assert log == [], tick
            wheel.advance()
        assert log == [1]
        wheel.stop()

    asyncio.run(turn())


def test_what_one_raises_keeps_no_other_waiting() -> None:
    class Broken(Item):
        def expired(self) -> None:
            super().expired()
            raise ValueError("broken")

    async def main() -> None:
        told: list[BaseException] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
        wheel, expired = Wheel(0.001), list[int]()
        for item in (Broken(0, expired), Item(1, expired)):
            wheel.set(item, 2)
        wheel.set(Item(2, expired), 4)
        while len(expired) < 3:
            await asyncio.sleep(0.001)
        assert expired == [0, 1, 2] and list(map(str, told)) == ["broken"]
        wheel.stop()

    asyncio.run(asyncio.wait_for(main(), 60))
