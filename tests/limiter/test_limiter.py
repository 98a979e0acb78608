"""
The settings of a limiter, and what can be asked.
"""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
from support.limiters import LimiterTestCase
from support.patience import PATIENCE
from twisted.internet.task import Clock
from zope.interface.verify import verifyObject

from connlimit import Limiter
from connlimit._limiter.admission import Admission
from connlimit._limiter.settings import FIELDS, Setting, Settings, SettingsDict
from connlimit.interfaces import ILimiter


@pytest.mark.parametrize("checker", ["mypy", "basedpyright"])
def test_type_checkers_find_each_mistake_and_nothing_else(checker: str, tmp_path: Path) -> None:
    for name in ("typed.py", "mistyped.py"):
        shutil.copy(Path(__file__).with_name(name), tmp_path)
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}')
    arguments = {
        "mypy": ["--config-file=", "--strict", "."],
        "basedpyright": ["--project", ".", "--pythonpath", sys.executable],
    }[checker]
    done = subprocess.run(
        [sys.executable, "-m", checker, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=10 * PATIENCE,
    )
    reported = re.findall(r"(\w+\.py):(\d+)\S* (?:- )?error", done.stdout)
    mistakes = (tmp_path / "mistyped.py").read_text().splitlines()
    expected = [("mistyped.py", str(number)) for number, line in enumerate(mistakes, 1) if "# wrong" in line]
    assert len(expected) == 7
    assert reported == expected, done.stdout + done.stderr


def test_it_provides_what_its_interface_says() -> None:
    verifyObject(ILimiter, Limiter())


def test_what_only_transports_tell_it_is_not_on_its_face() -> None:
    told = {name for name in vars(Admission) if not name.startswith("_")}
    shared = {"clock", "dry_run", "has_room", "limits", "settings"}
    assert {name for name in vars(Limiter) if not name.startswith("_")} & told == shared


class SettingsTests(LimiterTestCase):
    """
    Settings are checked, and changed all or none.
    """

    def test_wrong_values_are_refused_by_the_name_of_their_setting(self) -> None:
        for error, settings in [
            (ValueError, {"max_connections": -1}),
            (TypeError, {"max_connections": "10"}),
            (TypeError, {"max_connections": 1.5}),
            (TypeError, {"max_connections": True}),
            (ValueError, {"max_waiting": -5}),
            (TypeError, {"max_waiting": []}),
            (ValueError, {"wait_timeout": 0}),
            (ValueError, {"wait_timeout": -0.1}),
            (ValueError, {"wait_timeout": float("nan")}),
            (ValueError, {"wait_timeout": float("inf")}),
            (TypeError, {"wait_timeout": "30"}),
            (ValueError, {"name": ""}),
            (TypeError, {"name": None}),
            (TypeError, {"clock": "now"}),
            (TypeError, {"max_conections": 1}),
        ]:
            (name,) = settings
            with self.subTest(settings), pytest.raises(error, match=name):
                Limiter(**settings)
            if name in FIELDS:
                with self.subTest(settings), pytest.raises(error, match=name):
                    setattr(Limiter(), name, settings[name])

    def test_a_name_that_is_no_setting_cannot_be_set(self) -> None:
        with pytest.raises(AttributeError, match="max_conections"):
            Limiter().max_conections = 50
        with pytest.raises(TypeError, match="max_conections is not a setting; did you mean max_connections"):
            Limiter().reconfigure(max_conections=1)

    def test_a_mistyped_name_raises_and_tells_which_was_meant(self) -> None:
        limiter = self.limited(1)
        with pytest.raises(
            TypeError, match=r"max_conections is not a setting; did you mean max_connections\?"
        ):
            Limiter(max_conections=3)
        with pytest.raises(TypeError, match=r"observer is not a setting; did you mean observers\?"):
            Limiter(observer=[])
        with pytest.raises(AttributeError, match=r"has no max_conections; did you mean max_connections\?"):
            limiter.max_conections = 4
        with pytest.raises(AttributeError, match=r"has no max_conections; did you mean max_connections\?"):
            limiter.max_conections  # noqa: B018
        with pytest.raises(AttributeError, match=r"has no drian; did you mean drain\?"):
            limiter.drian(3)
        with pytest.raises(TypeError, match=r"oder is not a setting; did you mean order\?"):
            limiter.reconfigure(oder="lifo")
        with pytest.raises(AttributeError, match=r"has no colour$"):
            limiter.colour = "red"
        with pytest.raises(AttributeError, match=r"active"):
            limiter.active = 3
        self.assertEqual((limiter.max_connections, limiter.active), (1, 0))

    def test_arguments_and_attributes_are_those_of_the_table(self) -> None:
        arguments = inspect.signature(Limiter).parameters
        others = ["limits", "observers", "clock", "unknown"]
        self.assertEqual(list(arguments), [*FIELDS, *others])
        self.assertEqual(
            [name for name, each in vars(Limiter).items() if isinstance(each, Setting)], [*FIELDS]
        )
        self.assertEqual(list(SettingsDict.__annotations__), list(FIELDS))
        for name in FIELDS:
            assert arguments[name].annotation == SettingsDict.__annotations__[name].__forward_arg__, name
            assert FIELDS[name].metadata["help"][1:] in vars(Limiter)[name].__doc__
        self.assertEqual(Settings().evolve({name: arguments[name].default for name in FIELDS}), Settings())
        self.assertEqual(Limiter().settings, Settings())

    def test_each_setting_can_be_read_and_set_by_its_name(self) -> None:
        limiter = self.limited(1)
        for name, value in attrs.asdict(
            Settings(name="other", max_rate=5.0, log=False), recurse=False
        ).items():
            setattr(limiter, name, value)
            self.assertEqual(getattr(limiter, name), value)
        self.assertEqual(limiter.settings, Settings(name="other", max_rate=5.0, log=False))

    def test_one_wrong_value_changes_nothing(self) -> None:
        limiter = self.limited(1)
        self.connect(2)
        before = limiter.settings
        with pytest.raises(ValueError, match="max_waiting"):
            limiter.reconfigure(max_connections=5, max_waiting=-1)
        self.assertIs(limiter.settings, before)
        self.assert_counts(active=1, waiting=1)

    def test_several_settings_change_together(self) -> None:
        limiter = self.limited(1)
        limiter.reconfigure(max_connections=5, max_waiting=7, wait_timeout=3.5, name="mail")
        self.assertEqual(
            (limiter.max_connections, limiter.max_waiting, limiter.wait_timeout, limiter.name),
            (5, 7, 3.5, "mail"),
        )

    def test_the_clock_that_is_given_is_the_one_that_is_asked(self) -> None:
        clock = Clock()
        self.assertIs(Limiter(clock=clock).clock, clock)

    def test_it_shows_what_it_holds(self) -> None:
        self.limited(2, name="web")
        self.connect(3)
        self.assertEqual(repr(self.limiter), "<Limiter web: 2 of 2 served, 1 waiting>")


class SnapshotTests(LimiterTestCase):
    """
    The counters tell what happened.
    """

    def test_waits_are_counted_and_summed(self) -> None:
        self.limited(1)
        clients = self.connect(3)
        self.clock.advance(2)
        self.close(clients[0])
        self.clock.advance(3)
        self.assertEqual(self.limiter.snapshot().longest_wait, 5)
        self.close(clients[1])
        self.assert_counts(waits=2, wait_seconds=7.0, longest_wait=0.0, served=3, finished=2)

    def test_a_snapshot_does_not_change_any_more(self) -> None:
        self.limited(0, max_waiting=0)
        snapshot = self.limiter.snapshot()
        self.connect()
        self.assertEqual(snapshot.refused["full"], 0)
        with pytest.raises(AttributeError):
            snapshot.active = 5
        with pytest.raises(TypeError):
            snapshot.refused["full"] = 5
