"""
Directives whose text comes from the program itself, so that it cannot drift from it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

import attrs
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from support.guarantees import place
from twisted.python import usage
from zope.interface import Interface
from zope.interface.interface import InterfaceClass, Method

import connlimit
from connlimit import Limiter, interfaces
from connlimit._connection.known_protocols import KINDS
from connlimit._limiter.settings import FIELDS, values
from connlimit._twistd.command_line import Options
from connlimit._twistd.config import Config, ServiceConfig, StatusConfig
from connlimit._twistd.semaphores.command_line import Options as SemaphoresOptions
from connlimit._twistd.toml import document
from connlimit.interfaces import COUNTER, FIGURES
from connlimit.metrics import LimiterCollector
from connlimit.status.metrics import metric_name
from connlimit.status.watch import Watch


def _table(widths: str, rows: list[tuple[str, ...]]) -> str:
    """
    A table; the first row is its head.
    """
    lines = [".. list-table::", "   :header-rows: 1", f"   :widths: {widths}", ""]
    for row in rows:
        for index, cell in enumerate(row):
            lines.append(f"   {'*' if index == 0 else ' '} - {cell}")
    return "\n".join(lines)


class SettingsDirective(SphinxDirective):
    """
    The table of a limiter's settings.
    """

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(settings())


def settings() -> str:
    """
    The table of a limiter's settings, as text.
    """
    rows = [("Setting", "Values as text", "Default", "Means")]
    for name, field in FIELDS.items():
        texts, default = values(field)
        rows.append((f"``{name}``", texts, default, field.metadata["help"]))
    return _table("20 22 12 46", rows)


class FiguresDirective(SphinxDirective):
    """
    The table of a snapshot's figures.
    """

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(figures())


def figures() -> str:
    """
    The table of a snapshot's figures, as text.
    """
    rows = [("Field", "Kind", "Unit", "Means", "Metric")]
    for name, figure in FIGURES.items():
        metric = metric_name(name, figure) + ("_total" if figure.kind == COUNTER else "")
        rows.append((f"``{name}``", figure.kind, figure.unit, figure.help, f"``{metric}``"))
    return _table("16 12 14 36 22", rows)


class InterfacesDirective(SphinxDirective):
    """
    All interfaces, with what their methods promise; autodoc knows no interfaces of zope.
    """

    def run(self) -> list[nodes.Node]:
        lines = []
        for name, interface in vars(interfaces).items():
            if isinstance(interface, InterfaceClass) and interface.__module__ == interfaces.__name__:
                bases = ", ".join(base.__name__ for base in interface.getBases() if base is not Interface)
                lines += ["", f".. py:class:: {name}({bases})", ""]
                lines += _indented(interface.getDoc(), 3)
                for member, description in interface.namesAndDescriptions():
                    is_method = isinstance(description, Method)
                    kind, signature = (
                        ("method", description.getSignatureString()) if is_method else ("attribute", "")
                    )
                    lines += ["", f"   .. py:{kind}:: {member}{signature}", ""]
                    lines += _indented(description.getDoc(), 6)
        return self.parse_text_to_nodes("\n".join(lines))


def _indented(text: str, by: int) -> list[str]:
    return [" " * by + line for line in cleandoc(text).splitlines()]


class OptionsDirective(SphinxDirective):
    """
    What ``--help`` says of a program, but for the plugins that are installed.
    """

    parser: type[usage.Options] = Options

    def run(self) -> list[nodes.Node]:
        documented = type("Documented", (self.parser,), {"subCommands": ()})
        text = documented().getUsage(80).strip()
        return [nodes.literal_block(text, text, language="text")]


class SemaphoresOptionsDirective(OptionsDirective):
    """
    The same of ``twistd connlimit-semaphores``.
    """

    parser = SemaphoresOptions


class FileKeysDirective(SphinxDirective):
    """
    The keys of the configuration file, by the classes that it is read into.
    """

    def run(self) -> list[nodes.Node]:
        rows = [
            ("limiters.NAME.SETTING", "any setting of `Limiter`, by its name", ""),
            ("limiters.NAME.shared", "the URL by which all that give the same and NAME share the limit", ""),
        ]
        for prefix, cls in (("services.NAME.", ServiceConfig), ("status.", StatusConfig), ("", Config)):
            texts = dict(re.findall(r":ivar (\w+): ((?:.|\n)+?)\.\n", cls.__doc__))
            for field in attrs.fields(cls):
                if field.name not in ("name", "limiters", "shared", "services", "status"):
                    default = "" if field.default in (attrs.NOTHING, None, ()) else f"``{field.default}``"
                    rows.append((f"{prefix}{field.name}", texts[field.name], default))
        shown = [(f"``{key}``", text, default) for key, text, default in rows]
        return self.parse_text_to_nodes(_table("34 52 14", [("Key", "Means", "Default"), *shown]))


class LogEventsDirective(SphinxDirective):
    """
    Everything that is logged: the logger, the level and the format of each event.
    """

    def run(self) -> list[nodes.Node]:
        rows = [("Logger", "Level", "Event")]
        rows += [(f"``{logger}``", level, f"``{text}``") for logger, level, text in log_events()]
        return self.parse_text_to_nodes(_table("20 12 68", rows))


_LEVELS = {"debug": "debug", "info": "info", "warn": "warn", "error": "error", "failure": "critical"}


def log_events() -> list[tuple[str, str, str]]:
    """
    The logger, the level and the format of each event, by their loggers.
    """
    source = Path(connlimit.__file__).parent
    events = []
    for file in sorted(source.rglob("*.py")):
        tree = ast.parse(file.read_text())
        constants = {
            ast.unparse(each.targets[0]): each.value for each in tree.body if isinstance(each, ast.Assign)
        }
        # What has no logger of its own is given that of its room; what bounds any log, any.
        room = "any" if file.name == "bounded_log.py" else _room(file.relative_to(source))
        events += _logged(tree, room, constants)
    return sorted(set(events))


def _room(file: Path) -> str:
    return f"connlimit.{file.parts[0].lstrip('_').removesuffix('.py')}"


def _logged(node: ast.AST, logger: str, constants: dict[str, ast.expr]) -> Iterator[tuple[str, str, str]]:
    found = re.search(r"Logger\(namespace='([\w.]+)'\)", "\n".join(map(ast.unparse, node.body)))
    logger = found[1] if found else logger
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _logged(child, logger, constants)
            continue
        for call in ast.walk(child):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            if ast.unparse(call.func.value).endswith("log"):
                level = _LEVELS.get(call.func.attr)
                formats = call.args[:1]
                if call.func.attr == "over":
                    level, formats = "info", call.args[1:2]
                for each in formats if level else ():
                    text = constants.get(ast.unparse(each), each)
                    if isinstance(text, ast.Constant):
                        yield logger, level, text.value


class HouseDirective(SphinxDirective):
    """
    The rooms from the top, and what each module is for, in the words of its own first sentence.
    """

    def run(self) -> list[nodes.Node]:
        contracts = document(Path(__file__).parents[2] / "pyproject.toml")["tool"]["importlinter"][
            "contracts"
        ]
        source = Path(connlimit.__file__).parent
        lines = []
        for layer in next(each["layers"] for each in contracts if each["type"] == "layers"):
            for room in layer.split(" | "):
                package = source / room
                file = package / "__init__.py" if package.is_dir() else source / f"{room}.py"
                lines += [f"**{room}.** {_first_sentence(file)}", ""]
                modules = sorted(each for each in package.rglob("*.py") if each.name != "__init__.py")
                if modules:
                    lines += [".. list-table::", "   :widths: 30 70", ""]
                for module in modules:
                    name = ".".join(module.relative_to(package).with_suffix("").parts)
                    lines += [f"   * - ``{name}``", f"     - {_first_sentence(module)}"]
                lines.append("")
        return self.parse_text_to_nodes("\n".join(lines))


def _first_sentence(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text()))
    return " ".join(text.split("\n\n")[0].split())


class KindsDirective(SphinxDirective):
    """
    The kinds of protocols that answer.
    """

    def run(self) -> list[nodes.Node]:
        rows = [("Protocols", "Classes, and all that are made of them", "``refusal``")]
        for kind in KINDS:
            texts = [", ".join(f"``{name}``" for name in names) for names in (kind.classes, kind.refusals)]
            rows.append((kind.name, *texts))
        return self.parse_text_to_nodes(_table("25 55 20", rows))


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


class HeldByDirective(SphinxDirective):
    """
    The tests that hold a promise, as pytest calls them.
    """

    has_content = True

    def run(self) -> list[nodes.Node]:
        try:
            tests = [place(name) for name in self.content if name]
        except LookupError as error:
            raise self.error(str(error)) from None
        return self.parse_text_to_nodes("\n".join(f"- ``{test}``" for test in tests))


class MetricsDirective(SphinxDirective):
    """
    The metrics, as a collector gives them.
    """

    def run(self) -> list[nodes.Node]:
        watch = Watch(Limiter(1, name="web"))
        rows = [("Metric", "Type", "Means")]
        for family in LimiterCollector([watch], 0.0).collect():
            name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
            labels = ", ".join(
                sorted({label for sample in family.samples for label in sample.labels} - {"le"})
            )
            rows.append(
                (f"``{name}{{{labels}}}``" if labels else f"``{name}``", family.type, family.documentation)
            )
        return self.parse_text_to_nodes(_table("40 15 45", rows))


def setup(app: Sphinx) -> dict[str, bool]:
    """
    Register the directives.
    """
    app.add_directive("limiter-settings", SettingsDirective)
    app.add_directive("snapshot-figures", FiguresDirective)
    app.add_directive("interfaces", InterfacesDirective)
    app.add_directive("command-line-options", OptionsDirective)
    app.add_directive("semaphores-options", SemaphoresOptionsDirective)
    app.add_directive("file-keys", FileKeysDirective)
    app.add_directive("log-events", LogEventsDirective)
    app.add_directive("house", HouseDirective)
    app.add_directive("kinds-table", KindsDirective)
    app.add_directive("conformance-table", ConformanceDirective)
    app.add_directive("held-by", HeldByDirective)
    app.add_directive("metrics-table", MetricsDirective)
    return {"parallel_read_safe": True}
