"""What the original's own reader makes of dtypes that numpy does not have, put raw and fetched as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from areal_fast.shards import raw
from areal_fast.shards.description import describe
from areal_fast.shards.small_floats import SMALL_FLOATS, table
from tests.e2e.running import Proxy

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

from areal_env import ArealUnavailable, areal_python  # noqa: E402

pytestmark = [pytest.mark.areal, pytest.mark.timeout(600)]


def test_every_small_float_and_bfloat16_is_read_by_the_original() -> None:
    try:
        areal = areal_python()
    except ArealUnavailable as why:
        pytest.skip(f"no environment for AReaL 1.0.4: {why}")
    every = np.arange(256)
    halves = np.arange(1 << 16, dtype="<u2")
    shards = {
        dtype: (bytes(range(256)), np.where(np.isnan(table(dtype)), -1, every)) for dtype in SMALL_FLOATS
    }
    wide = (halves.astype("<u4") << 16).view("<f4")
    shards["bfloat16"] = halves.tobytes(), np.where(np.isnan(wide), -1, halves.astype("<i2").astype(int))
    lines = []
    with Proxy(workers=1, log_level="warning") as proxy:
        for dtype, (data, _) in shards.items():
            what = describe(dtype, (len(data) // (2 if dtype == "bfloat16" else 1),))
            file = raw.lay_out([("t", what)]).header + data
            answer = proxy.ask("PUT", f"/data/{dtype}", file, headers={"content-type": raw.MEDIA_TYPE})
            assert answer.status == 200
            lines.append(proxy.ask("GET", f"/data/{dtype}").body)
    done = subprocess.run(
        [areal, HERE / "areal_small_floats.py"], input=b"\n".join(lines), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    for (dtype, (_, want)), line in zip(shards.items(), done.stdout.splitlines(), strict=True):
        name, shape, seen = json.loads(line)
        assert (name, shape) == (f"torch.{dtype}", [len(want)])
        assert seen == want.tolist(), dtype
