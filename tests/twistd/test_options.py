"""
The help texts: what they show, and in which order.
"""

from __future__ import annotations

import re

import pytest
from twisted.python import usage

from connlimit._limiter.settings import FIELDS, values
from connlimit._twistd.command_line import Options
from connlimit._twistd.options import ProgramOptions
from connlimit._twistd.semaphores.command_line import LISTEN
from connlimit._twistd.semaphores.command_line import Options as SemaphoresOptions

PROGRAMS = pytest.mark.parametrize("program", [Options, SemaphoresOptions])


def sections(text: str) -> dict[str, str]:
    """
    The parts of a help text, by their titles.
    """
    parts = re.split(r"^(\S.*):$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@PROGRAMS
def test_each_option_stands_in_one_group(program: type[ProgramOptions]) -> None:
    options = program()
    grouped = [name for names in options.groups.values() for name in names]
    assert sorted(grouped) == sorted(each.rstrip("=") for each in options.longOpt)


@PROGRAMS
def test_a_help_text_fits_80_columns_and_ends_with_examples(program: type[ProgramOptions]) -> None:
    text = program().getUsage(80)
    assert max(map(len, text.splitlines())) <= 80
    assert list(sections(text))[-1] == "Examples"
    assert f"twistd -n {program.program} " in sections(text)["Examples"]


@PROGRAMS
@pytest.mark.parametrize("width", [1, 28, 200])
def test_a_help_text_can_have_any_width(program: type[ProgramOptions], width: int) -> None:
    text = program().getUsage(width)
    assert "--listen=" in text
    assert "Examples:" in text


@pytest.mark.parametrize("description", ["", None])
def test_a_plugin_that_does_not_describe_itself_is_listed(description: str | None) -> None:
    class Described(Options):
        subCommands = (("silent", None, usage.Options, description),)

    assert "  silent" in sections(Described().getUsage(80))["Plugins"]


def test_the_groups_go_from_what_is_limited_to_what_can_be_seen() -> None:
    groups = list(sections(Options().getUsage(80)))
    assert groups[:6] == ["What is limited", "Limits", "Queue", "Refusing", "Stopping", "Seeing"]


def test_settings_stand_in_the_order_of_their_table() -> None:
    shown = sections(Options().getUsage(80))
    for group in {field.metadata["group"] for field in FIELDS.values()}:
        names = [name.replace("-", "_") for name in re.findall(r"^  --([\w-]+)", shown[group], re.MULTILINE)]
        assert [name for name in names if name in FIELDS] == [
            name for name, field in FIELDS.items() if field.metadata["group"] == group
        ]


@pytest.mark.parametrize("name", FIELDS)
def test_each_setting_shows_its_choices_and_its_default(name: str) -> None:
    text = " ".join(Options().getUsage(80).split())
    choices, default = values(FIELDS[name])
    option = text.split(f"--{name.replace('_', '-')}= ")[1].split("--")[0]
    assert f"[{choices}; default: {default}]" in option
    kind = FIELDS[name].metadata["kind"]
    assert kind.of_text(name, default) == FIELDS[name].default
    assert all(choice in choices for choice in kind.choices)


def test_the_server_of_semaphores_says_where_it_listens() -> None:
    options = SemaphoresOptions()
    options.parseOptions([])
    assert f"[default: {LISTEN}]" in " ".join(options.getUsage(80).split())
