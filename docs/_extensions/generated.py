"""
Directives whose text comes from the program itself, so that it cannot drift from it.
"""

from __future__ import annotations

import ast
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from twisted.python import usage

from connlimit import Limiter
from connlimit._settings import FIELDS
from connlimit._tap import Options
from connlimit.metrics import LimiterCollector
from connlimit.semaphores._tap import Options as SemaphoresOptions
from connlimit.status._watch import Watch


class SettingsDirective(SphinxDirective):
    """
    The table of a limiter's settings.
    """

    def run(self) -> list[nodes.Node]:
        lines = [".. list-table::", "   :header-rows: 1", "   :widths: 20 14 14 12 40", ""]
        rows = [("Setting", "Type", "Unit", "Default", "Means")]
        for name, field in FIELDS.items():
            unit, help = field.metadata["unit"] or "text", field.metadata["help"]
            rows.append((f"``{name}``", f"``{field.type}``", unit, f"``{field.default}``", help))
        for row in rows:
            for index, cell in enumerate(row):
                lines.append(f"   {'*' if index == 0 else ' '} - {cell}")
        return self.parse_text_to_nodes("\n".join(lines))


class OptionsDirective(SphinxDirective):
    """
    What ``--help`` says of a program, before it lists other plugins.
    """

    parser: type[usage.Options] = Options

    def run(self) -> list[nodes.Node]:
        text = self.parser().getUsage(80).split("Commands:")[0].rstrip()
        return [nodes.literal_block(text, text, language="text")]


class SemaphoresOptionsDirective(OptionsDirective):
    """
    The same of ``twistd connlimit-semaphores``.
    """

    parser = SemaphoresOptions


class ConformanceDirective(SphinxDirective):
    """
    The rows of the conformance table, as the tests have them.
    """

    def run(self) -> list[nodes.Node]:
        tests = Path(__file__).parents[2] / "tests" / "test_conformance.py"
        for statement in ast.parse(tests.read_text()).body:
            if isinstance(statement, ast.AnnAssign) and statement.target.id == "CONVERSATIONS":
                rows = [key.value for key in statement.value.keys]
        return self.parse_text_to_nodes("\n".join(f"- {row}" for row in rows))


class MetricsDirective(SphinxDirective):
    """
    The metrics, as a collector gives them.
    """

    def run(self) -> list[nodes.Node]:
        watch = Watch(Limiter(1, name="web"))
        lines = [".. list-table::", "   :header-rows: 1", "   :widths: 40 15 45", ""]
        rows = [("Metric", "Type", "Means")]
        for family in LimiterCollector([watch], 0.0).collect():
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels = ", ".join(
                sorted({label for sample in family.samples for label in sample.labels} - {"le"})
            )
            rows.append(
                (f"``{name}{{{labels}}}``" if labels else f"``{name}``", family.type, family.documentation)
            )
        for row in rows:
            for index, cell in enumerate(row):
                lines.append(f"   {'*' if index == 0 else ' '} - {cell}")
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> dict[str, bool]:
    """
    Register the directives.
    """
    app.add_directive("limiter-settings", SettingsDirective)
    app.add_directive("command-line-options", OptionsDirective)
    app.add_directive("semaphores-options", SemaphoresOptionsDirective)
    app.add_directive("conformance-table", ConformanceDirective)
    app.add_directive("metrics-table", MetricsDirective)
    return {"parallel_read_safe": True}
