"""The timetable: morning (agents at work), a weight update, an accident, stale sessions, the evening, the
audit.

Times are shares of `--seconds`, the time agents begin new episodes. An episode is one session, or a group
of two; what becomes of it is drawn by lot: exported by the trainer, rewarded and then forgotten, or
abandoned in the middle. What is forgotten or abandoned goes stale and must turn up as a dump. A few
sessions are still open in the evening, when the proxy gets SIGTERM: they must turn up too.

Nothing waits for a time where it can wait for a condition; every such wait has a limit, and running into
it is a failed check, not a hang.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from areal_fast.demo.agents import World, converse
from areal_fast.demo.ledger import Check, Ledger, Session
from areal_fast.demo.proxy import Proxy, ProxyFailed
from areal_fast.demo.report import Day, report
from areal_fast.demo.screen import Screen
from areal_fast.demo.trainer import Dumps, Trainer, session_of

REQUEST_LATENCY_S = 0.01
TOKEN_LATENCY_S = 0.0015
CLEANUP_INTERVAL_S = 0.5
WATCHDOG_S = 30.0
PROBES = 16


def run(args: argparse.Namespace) -> int:
    """The whole demo, with the flags of areal_fast.demo.flags. Returns the exit status."""
    screen = Screen()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="areal_fast-demo-"))
    seed = args.seed if args.seed is not None else time.time_ns() % 1_000_000
    proxy = Proxy(
        folder, workers=args.workers, timeout_s=args.session_timeout_seconds, interval_s=CLEANUP_INTERVAL_S
    )
    try:
        screen.status("starting the proxy")
        took = proxy.start()
        screen.event(f"proxy ready in {took:.1f} s at {proxy.url} (its log: {proxy.log_path}; seed {seed})")
        return asyncio.run(_Conductor(args, screen, proxy, seed).day())
    except (ProxyFailed, OSError) as error:
        screen.event(f"FAILED: {error} (the proxy's log: {proxy.log_path})")
        return 1
    except KeyboardInterrupt:
        screen.event("interrupted")
        return 128 + signal.SIGINT
    finally:
        proxy.close()


class _Conductor:
    """Runs the day. One object, because everything that happens wants to be counted in one place."""

    def __init__(self, args: argparse.Namespace, screen: Screen, proxy: Proxy, seed: int) -> None:
        self.args = args
        self.screen = screen
        self.proxy = proxy
        self.ledger = Ledger()
        self.world = World(proxy.url, proxy.admin_key, self.ledger, seed)
        self.trainer = Trainer(self.world)
        self.dumps = Dumps(proxy.dumps)
        self.day_ = Day(
            self.ledger, self.trainer.learned, self.dumps, proxy.usage, proxy.folder, time.monotonic()
        )
        self.over = asyncio.Event()
        self.everyone = Check("every agent and the trainer did all of their work")
        self.updated = Check(
            "every worker paused, and served the new weight version, before the call returned"
        )
        self.replaced = Check("the killed worker was replaced")
        self.contained = Check("requests broke only where the killed worker had them")
        self.stale = Check("sessions left alone went stale and were dumped, no others")
        self.stopped = Check("SIGTERM: live sessions dumped, exit status 0, no process left")

    async def day(self) -> int:
        """From the first agent to the verdict: the exit status."""
        await self._engine(request_latency_s=REQUEST_LATENCY_S, token_latency_s=TOKEN_LATENCY_S)
        self.day_.request_latency_s, self.day_.token_latency_s = REQUEST_LATENCY_S, TOKEN_LATENCY_S
        watching = asyncio.create_task(self._watch())
        training = asyncio.create_task(self._noted("trainer", self.trainer.run()))
        agents = [
            asyncio.create_task(self._noted(f"agent {i}", self._agent(i))) for i in range(self.args.agents)
        ]
        self.screen.event(f"{self.args.agents} agents begin; {self.args.workers} workers, one trainer")
        began = time.monotonic()
        try:
            await asyncio.sleep(self.args.seconds * 0.35)
            await self._noted("weight update", self._update_weights())
            await asyncio.sleep(max(0.0, began + self.args.seconds * 0.65 - time.monotonic()))
            await self._noted("accident", self._accident())
            await asyncio.sleep(max(0.0, began + self.args.seconds - time.monotonic()))
            self.over.set()
            self.screen.event("no new episodes; agents finish theirs")
            await asyncio.gather(*agents)
            await self.trainer.queue.put(None)
            await training
            await self._noted("clean-up", self._wait_for_dumps())
            await self._noted("evening", self._evening())
        finally:
            for task in (watching, training, *agents):
                task.cancel()
            await self.world.close()
        return self._verdict()

    async def _noted(self, who: str, work: Awaitable[None]) -> None:
        """Do `work`; an error in it is a failed check, with its text, and the day goes on."""
        try:
            await work
        except Exception as error:  # whatever it is belongs into the report
            self.everyone.that(False, f"{who}: {type(error).__name__}: {error}")
            self.screen.event(f"{who} failed: {type(error).__name__}: {str(error)[:200]}")
        else:
            self.everyone.that(True, "")

    # -- people --------------------------------------------------------------------------------------------
    async def _agent(self, number: int) -> None:
        """Episodes one after another until the day is over."""
        choose = self.world.random
        await asyncio.sleep(choose.uniform(0, 0.3))
        episode = 0
        while not self.over.is_set():
            episode += 1  # an id of its own for each, so that a row tells whose it is
            lot = choose.random()
            group_size = 2 if lot < 0.15 else 1
            group_id, sessions = await self.world.start(f"agent {number}/episode {episode}", group_size)
            turns = choose.randrange(2, 6)
            await asyncio.gather(*(converse(self.world, session, turns) for session in sessions))
            fate = "abandoned" if lot > 0.9 else "forgotten" if lot > 0.8 else "exported"
            for session in sessions:
                session.fate = fate
                if fate != "abandoned":
                    await self.world.reward(session, round(choose.uniform(-1, 1), 3))
            if fate == "exported":
                await self.trainer.queue.put((group_id if group_size > 1 else "", sessions))

    async def _watch(self) -> None:
        """Show how things stand, and look at memory and CPU."""
        while True:
            turns = self.ledger.turns
            sessions = self.ledger.sessions
            broke = f", {len(self.world.failures)} requests broke" if self.world.failures else ""
            self.screen.status(
                f"{len(turns):,} answers in {len(sessions):,} sessions, "
                f"{self.trainer.learned.trajectories:,} trajectories exported, "
                f"{sum(1 for _ in self.dumps.folder.iterdir()):,} dumps{broke}"
            )
            await asyncio.to_thread(self.proxy.observe)
            await asyncio.sleep(0.5)

    # -- the operator --------------------------------------------------------------------------------------
    async def _engine(self, **switches: Any) -> None:
        await asyncio.to_thread(
            self.proxy.call, "POST", f"{self.proxy.engine_url}/embedded/configure", switches
        )

    async def _busy_engine(self) -> None:
        """Until a third of the agents have an answer under way."""
        await self._until(
            lambda: (
                self.proxy.call("GET", f"{self.proxy.engine_url}/embedded/stats")["in_flight"]
                >= self.args.agents / 3
            ),
            "the engine never had a third of the agents",
        )

    async def _until(
        self, condition: Callable[[], bool], otherwise: str, limit_s: float = WATCHDOG_S
    ) -> None:
        """Wait until `condition` (called in a thread) holds. Raises TimeoutError with a text."""
        limit = time.monotonic() + limit_s
        while not await asyncio.to_thread(condition):
            if time.monotonic() > limit:
                raise TimeoutError(otherwise)
            await asyncio.sleep(0.02)

    async def _everywhere(self, name: str, value: object) -> None:
        """Ask /health on many new connections, so that every worker answers some; all must agree."""
        seen = await asyncio.gather(*(asyncio.to_thread(self.proxy.health) for _ in range(PROBES)))
        for health in seen:
            self.updated.that(health[name] == value, f"a worker says {name} {health[name]}, not {value}")

    async def _update_weights(self) -> None:
        """As a trainer does it: pause, load the new weights, announce the version, continue."""
        await self._busy_engine()
        update = self.ledger.update
        update.began = time.monotonic()
        await self.world.client.pause()
        await self._everywhere("paused", True)
        load = {"model_path": "weights of version 1"}
        await asyncio.to_thread(
            self.proxy.call, "POST", f"{self.proxy.engine_url}/update_weights_from_disk", load
        )
        await self.world.client.set_version(1)
        await self._everywhere("version", 1)
        await self.world.client.resume()
        update.ended = time.monotonic()
        await self._everywhere("paused", False)
        self.screen.event(
            f"weights updated to version 1, generation paused for {update.ended - update.began:.2f} s"
        )

    async def _accident(self) -> None:
        """SIGKILL for a worker with requests in its hands."""
        await self._busy_engine()
        accident = self.day_.accident
        before = await asyncio.to_thread(self.proxy.worker_pids)
        accident.pid = self.world.random.choice(before)
        accident.at = time.monotonic()
        self.proxy.kill_worker(accident.pid)
        self.screen.event(f"accident: worker {accident.pid} of {before} killed with SIGKILL")

        def replaced() -> bool:
            pids = self.proxy.worker_pids()
            return len(pids) == len(before) and accident.pid not in pids

        try:
            await self._until(replaced, f"after {WATCHDOG_S:g} s there is no new worker")
        finally:
            accident.recovered_at = time.monotonic()
        pids = await asyncio.to_thread(self.proxy.worker_pids)
        self.replaced.that(set(pids) > set(before) - {accident.pid}, f"workers were {before}, are {pids}")
        self.screen.event(f"a new worker is up after {accident.recovered_at - accident.at:.2f} s: {pids}")

    async def _wait_for_dumps(self) -> None:
        """Until every session that was left alone has been dumped; then see what the dumps hold."""
        left = {name: session for name, session in self.ledger.sessions.items() if session.fate != "exported"}
        self.screen.event(f"{len(left)} sessions were left alone; those not dumped yet are going stale")

        def dumped() -> bool:
            names = {session_of(path.name) for path in self.dumps.folder.iterdir()}
            return names >= {name for name, session in left.items() if session.turns}

        limit_s = self.args.session_timeout_seconds + WATCHDOG_S
        await self._until(dumped, f"not all of them were dumped within {limit_s:g} s", limit_s)
        self.dumps.read_new(self.world)
        for session in self.ledger.sessions.values():
            if session.turns:
                self._expect(session, self.stale, "dump" if session.fate != "exported" else "export")

    @staticmethod
    def _expect(session: Session, check: Check, where: str) -> None:
        places = {place.split()[0] for turn in session.turns for place in turn.found}
        check.that(places == {where}, f"{session.id} ({session.fate}) is in {sorted(places) or 'no place'}")

    async def _evening(self) -> None:
        """A few conversations are under way or waiting for their export when the proxy is told to stop."""
        _, sessions = await self.world.start("evening", 4)
        await asyncio.gather(*(converse(self.world, session, 2) for session in sessions))
        for i, session in enumerate(sessions):
            session.fate = "evening"
            if i % 2:
                await self.world.reward(session, 0.5)
        self.day_.evening_sessions = len(sessions)
        self.screen.event(f"evening: {len(sessions)} sessions are still open; the proxy gets SIGTERM")
        began = time.monotonic()
        status = await asyncio.to_thread(self.proxy.stop)
        self.screen.event(
            f"the proxy stopped after {time.monotonic() - began:.2f} s with exit status {status}"
        )
        self.stopped.that(status == 0, f"exit status {status}")
        left = await asyncio.to_thread(self.proxy.leftovers)
        self.stopped.that(not left, f"processes {left} are still there")
        self.dumps.read_new(self.world)
        self.dumps.expect_no_leftovers()
        for session in sessions:
            self._expect(session, self.stopped, "dump")

    def _verdict(self) -> int:
        day = self.day_
        day.ended = time.monotonic()
        day.failures, day.call_latency_s = self.world.failures, self.world.call_latency_s
        for failure in day.failures:
            near = failure.sent <= day.accident.recovered_at and failure.noticed >= day.accident.at > 0
            self.contained.that(near, f"{failure.path} at {failure.noticed - day.began:.1f} s")
        if not day.failures:
            self.contained.that(True, "")
        day.checks = [
            *self.ledger.checks(),
            self.updated,
            self.replaced,
            self.contained,
            self.trainer.shards,
            self.stale,
            self.dumps.check,
            self.stopped,
            self.everyone,
        ]
        for line in report(day):
            self.screen.line(line)
        return 0 if all(check.holds for check in day.checks) else 1
