"""
The waiting line, with its operations in any order.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zope.interface.verify import verifyObject

from connlimit._line import Fifo
from connlimit.interfaces import IWaitingLine


def test_it_is_a_line() -> None:
    verifyObject(IWaitingLine, Fifo())


def test_who_does_not_wait_cannot_leave() -> None:
    with pytest.raises(KeyError):
        Fifo().remove("nobody")


@given(st.lists(st.integers(-1, 20)))
def test_it_serves_in_order_of_arrival_whoever_leaves_from_the_middle(steps: list[int]) -> None:
    line, model = Fifo(), []
    for now, step in enumerate(steps):
        if step < 0:
            line.add(now, float(now))
            model.append(now)
        elif model:
            leaving = model.pop(step % len(model))
            assert line.remove(leaving) == leaving
        assert list(line) == model
        assert len(line) == len(model)
        if model:
            assert line.next(0.0) == model[0]
            assert line.oldest() == (model[0], float(model[0]))
            assert model[0] in line
