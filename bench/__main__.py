"""
Runs benchmarks, prints what they find, and writes it for the documentation.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.cases import (
    burst,
    interfaces,
    jobs,
    life,
    line,
    memory,
    overhead,
    overload,
    proxies,
    relay,
    semaphores,
    shared,
    start,
    workers,
)
from bench.harness import write
from bench.harness.results import Result

BENCHMARKS: dict[str, Callable[[bool], Iterator[Result]]] = {
    "overhead": overhead.run,
    "interfaces": interfaces.run,
    "proxies": proxies.run,
    "relay": relay.run,
    "line": line.run,
    "memory": memory.run,
    "overload": overload.run,
    "burst": burst.run,
    "start": start.run,
    "life": life.run,
    "jobs": jobs.run,
    "shared": shared.run,
    "workers": workers.run,
    "semaphores": semaphores.run,
}


def main() -> None:
    """
    Run the benchmarks that are named, or all.
    """
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="show that they run; the figures mean little")
    parser.add_argument(
        "--write", type=Path, metavar="FOLDER", help="write the results there, as JSON, tables and plots"
    )
    options = parser.parse_args()
    for name in options.names:
        if name not in BENCHMARKS:
            raise SystemExit(f"bench: NAME must be one of {', '.join(BENCHMARKS)}, not {name!r}")
    for name in options.names or BENCHMARKS:
        began = time.monotonic()
        results = []
        for result in BENCHMARKS[name](options.quick):
            results.append(result)
            print(result, flush=True)
        print(f"{name} took {time.monotonic() - began:.0f} s\n", flush=True)
        if options.write is not None:
            write.write(options.write, name, results)


if __name__ == "__main__":
    main()
