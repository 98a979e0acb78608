"""
Runs benchmarks and prints their figures: python -m bench [--quick] [NAME]...
"""

from __future__ import annotations

import argparse

from bench import interfaces, line, memory, shared, workers

BENCHMARKS = {
    "interfaces": interfaces.run,
    "line": line.run,
    "memory": memory.run,
    "shared": shared.run,
    "workers": workers.run,
}


def main() -> None:
    """
    Run the benchmarks that are named, or all.
    """
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="show that they run; the figures mean little")
    options = parser.parse_args()
    for name in options.names or BENCHMARKS:
        if name not in BENCHMARKS:
            parser.error(f"NAME must be one of {', '.join(BENCHMARKS)}, not {name!r}")
        for text in BENCHMARKS[name](options.quick):
            print(text, flush=True)


if __name__ == "__main__":
    main()
