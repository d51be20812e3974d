"""The session store: sessions, rewards, exports and cleanup over an arena, without HTTP.

Every worker process has one `SessionStore` over the shared arena; it keeps nothing of its own but caches. It
can be scripted directly, with a private arena:

>>> import numpy as np, tempfile
>>> from areal_fast.protocol.messages import ExportRequest
>>> from areal_fast.store import SessionStore
>>> store = SessionStore.open(max_bytes=16 << 20)
>>> started = store.start("math-7")
>>> session_id, key = started.sessions[0]
>>> session_id
'math-7-0'
>>> with store.by_key(key) as session:
...     turn = session.begin_turn(reserve_tokens=6)
...     turn.commit(
...         prompt_ids=np.array([1, 2, 3], np.int32),
...         output_ids=np.array([4, 5], np.int32),
...         logprobs=np.array([-0.5, -0.25], np.float32),
...         version_runs=[(0, 2)],
...         stop_reason="stop",
...     )
...     session.set_reward(1.0, None).trajectory_id
0
>>> export = store.begin_export(ExportRequest(session_ids=["math-7-0"], dialect="pr1268"))
>>> export.interactions
1
>>> export.delivered()
>>> with tempfile.TemporaryDirectory() as folder:
...     report = store.cleanup_stale(timeout_s=0.0, dump_path=folder)
>>> (report.sessions, report.files, report.failures)
(1, [], [])
>>> store.close()

What may fail is in `areal_fast.errors` (refusals clients see) and `areal_fast.core` (ArenaFull, IndexBusy:
try again a moment later, Gone: the session was removed meanwhile). Calls belong to one thread, the loop's.
"""

from areal_fast.store.cleanup import CleanupFailure, CleanupReport
from areal_fast.store.exporting import Export
from areal_fast.store.session import RewardResult, Session, Turn
from areal_fast.store.store import ReadyEvent, SessionStore, StartedGroup

__all__ = [
    "CleanupFailure",
    "CleanupReport",
    "Export",
    "ReadyEvent",
    "RewardResult",
    "Session",
    "SessionStore",
    "StartedGroup",
    "Turn",
]
