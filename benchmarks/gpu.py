"""GPU shards: put, get and map against a plain device copy of the same size, through a real keeper process.

Method. One keeper on the first GPU, one client in this process. For each size: `copy` is cuMemcpyDtoD
within this process, the bandwidth's measure; `put` reserves, copies in and commits; `get` leases, copies
out and releases; `map` leases and releases without a copy; `read` is the keeper's copy to the host, which
HTTP readers get. Rounds are interleaved, medians of wall time are printed with the quartiles. Where there
is no GPU it says why and measures nothing. `--fake` runs on the fake driver: it shows the protocol's own
cost, no bandwidth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from areal_fast import config
from areal_fast.core._cuda import CudaError, Driver
from tests import fakecuda
from tests.gpu.keeping import Keeping

SIZES = (4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--fake", action="store_true", help="on the fake driver: the protocol's cost alone")
    parser.add_argument("--json", action="store_true")
    flags = parser.parse_args()
    library = fakecuda.library() if flags.fake else config.cuda_library()
    try:
        driver = Driver(library)
        device = driver.open(0)
        name = driver.name(0)
    except CudaError as error:
        print(f"no GPU to measure: {error}")
        return 0
    sizes = SIZES[:3] if flags.fake else SIZES
    with Keeping(library, pool_bytes=4 * sizes[-1]) as keeping:
        keeping.start()
        with keeping.client() as client:
            rows = [measure(keeping, client, device, nbytes, flags.rounds) for nbytes in sizes]
    if flags.json:
        print(json.dumps({"device": name, "driver": driver.version, "rows": rows}))
        return 0
    print(f"{name}, driver {driver.version}, {flags.rounds} rounds; µs, median (quartiles), and GB/s")
    for row in rows:
        print(f"{row['bytes'] >> 10:>8} KiB  " + "  ".join(_cell(row, what) for what in row["us"]))
    return 0


def measure(keeping: Keeping, client, device, nbytes: int, rounds: int) -> dict:  # type: ignore[no-untyped-def, type-arg]
    """One size's row: {"bytes": n, "us": {what: [lower quartile, median, upper quartile]}}."""
    source, target = device.alloc(nbytes), device.alloc(nbytes)
    scratch = device.create_pool(nbytes, 2)
    shape = (nbytes,)

    def read() -> None:
        client.read("s")

    what: dict[str, Callable[[], object]] = {
        "copy": lambda: scratch.copy_in(0, source, nbytes),
        "put": lambda: client.put("s", source, "uint8", shape),
        "get": lambda: client.get_into("s", target, nbytes),
        "map": lambda: client.map("s").release(),
        "read": read,
    }
    for call in what.values():
        call()
    times: dict[str, list[float]] = {key: [] for key in what}
    for _ in range(rounds):
        for key, call in what.items():
            begun = time.perf_counter()
            call()
            times[key].append((time.perf_counter() - begun) * 1e6)
    device.free(source)
    device.free(target)
    return {"bytes": nbytes, "us": {key: statistics.quantiles(found, n=4) for key, found in times.items()}}


def _cell(row: dict, what: str) -> str:  # type: ignore[type-arg]
    low, middle, high = row["us"][what]
    speed = "" if what == "map" else f" {row['bytes'] / middle / 1e3:.1f} GB/s"
    return f"{what} {middle:.0f} ({low:.0f} to {high:.0f}){speed}"


if __name__ == "__main__":
    sys.exit(main())
