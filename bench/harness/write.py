"""
Writes what benchmarks find for the documentation: one JSON file, and a table or a plot for each result.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attrs

from bench.harness.results import Plot, Result, Table

_FILE = "measurements.json"

# How the other programs tell their version.
_VERSIONS = {
    "HAProxy": ("haproxy", "-v"),
    "nginx": ("nginx", "-v"),
    "socat": ("socat", "-V"),
    "wrk": ("wrk", "-v"),
    "valgrind": ("valgrind", "--version"),
}


def machine() -> dict[str, str]:
    """
    What the figures were measured on.
    """
    kilobytes = int(_find("/proc/meminfo", r"MemTotal:\s*(\d+)"))
    facts = {
        "Processor": _find("/proc/cpuinfo", r"model name\s*:\s*(.+)"),
        "CPUs": str(len(os.sched_getaffinity(0))),
        "Memory": f"{kilobytes / 2**20:.0f} GiB",
        "Kernel": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "Twisted": version("Twisted"),
    }
    for name, (program, option) in _VERSIONS.items():
        path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if path is None:
            continue
        done = subprocess.run([path, option], capture_output=True, text=True)
        found = re.search(r"\d+\.\d+[.\d]*", done.stdout + done.stderr)
        facts[name] = found[0] if found else "unknown version"
    return facts


def _find(file: str, pattern: str) -> str:
    found = re.search(pattern, Path(file).read_text())
    return found[1] if found else "0"


def write(folder: Path, name: str, results: Sequence[Result]) -> None:
    """
    Write what one benchmark found beside what others have found on the same machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / _FILE
    here = machine()
    known = json.loads(file.read_text()) if file.exists() else {}
    if known.get("machine") != here:
        known = {"machine": here, "benchmarks": {}}
    known["benchmarks"][name] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "results": json.loads(json.dumps([_plain(result) for result in results])),
    }
    file.write_text(json.dumps(known, indent=1) + "\n")
    for result in results:
        if isinstance(result, Table):
            (folder / f"{result.name}.rst").write_text(_table(result))
        elif isinstance(result, Plot):
            (folder / f"{result.name}-plot.rst").write_text(_figure(folder, result))
            _draw(folder / f"{result.name}.svg", result)
    (folder / "notes.rst").write_text("\n".join(_notes(known["benchmarks"])) + "\n")
    (folder / "machine.rst").write_text(_machine(known))
    (folder / "missed.rst").write_text("\n".join(_missed(known["benchmarks"])) + "\n")


def _plain(result: Result) -> dict[str, Any]:
    """
    A result as JSON has it.
    """
    return {"kind": type(result).__name__.lower(), **attrs.asdict(result)}


def _listed(rows: Sequence[Sequence[object]]) -> Iterator[str]:
    for row in rows:
        for index, cell in enumerate(row):
            yield f"   {'*' if index == 0 else ' '} - {cell}".rstrip()


def _table(table: Table) -> str:
    head = [f".. list-table:: {table.caption}", "   :header-rows: 1", f"   :stub-columns: {table.named}", ""]
    return "\n".join([*head, *_listed([table.columns, *table.rows])]) + "\n"


def _figure(folder: Path, plot: Plot) -> str:
    # Beside the page that includes it.
    head = [
        f".. figure:: {folder.name}/{plot.name}.svg",
        f"   :alt: {plot.caption}",
        "",
        f"   {plot.caption}",
    ]
    return "\n".join(head) + "\n"


def _machine(known: Mapping[str, Any]) -> str:
    dates = sorted({each["date"] for each in known["benchmarks"].values()})
    facts = {**known["machine"], "Measured": dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"}
    return "\n".join([".. list-table::", "   :stub-columns: 1", "", *_listed(list(facts.items()))]) + "\n"


def _notes(benchmarks: Mapping[str, Any]) -> Iterator[str]:
    """
    What the benchmarks have to say besides, as a list.
    """
    notes = [each for one in benchmarks.values() for each in one["results"] if each["kind"] == "note"]
    # Several miss the same program.
    yield from dict.fromkeys(f"- {note['text']}" for note in notes)
    if not notes:
        yield "Nothing is left out."


def _missed(benchmarks: Mapping[str, Any]) -> Iterator[str]:
    """
    The aims that are missed, as a list.
    """
    none = True
    for result in (each for benchmark in benchmarks.values() for each in benchmark["results"]):
        for row in result.get("rows", ()):
            for cell in row:
                if isinstance(cell, dict) and cell.get("met") is False:
                    none = False
                    figure = cell["figure"]
                    column = result["columns"][row.index(figure)]
                    median = figure["form"].format(figure["median"])
                    about = ", ".join([*row[: result["named"]], column])
                    yield f"- {result['caption']}: {about}: {median}, where the aim is {cell['aim']}"
    if none:
        yield "No aim is missed."


def _draw(file: Path, plot: Plot) -> None:
    """
    Draw a plot, the same for the same figures.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    across = min(3, len(plot.panels))
    down = -(-len(plot.panels) // across)
    with pyplot.rc_context({"svg.hashsalt": "connlimit", "svg.fonttype": "none", "font.size": 8}):
        figure, all_axes = pyplot.subplots(
            down, across, sharex=True, sharey=True, squeeze=False, figsize=(8, 0.6 + 1.9 * down)
        )
        for axes, (title, curves) in zip(all_axes.flat, plot.panels.items(), strict=False):
            axes.set_title(title)
            axes.set_yscale("symlog", linthresh=10)
            axes.grid(alpha=0.3)
            for (label, curve), style in zip(curves.items(), ("-", "--", ":"), strict=False):
                axes.plot(curve.x, curve.y, style, label=label)
        all_axes.flat[0].set_ylim(bottom=0)
        for axes in all_axes.flat[len(plot.panels) :]:
            axes.set_visible(False)
        figure.supxlabel(plot.x)
        figure.supylabel(plot.y)
        handles, labels = all_axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / (0.6 + 1.9 * down)))
        figure.savefig(file, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
