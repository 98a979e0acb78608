"""
The configuration file of the semaphores, which is that of Throttle.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeGuard

from connlimit._twistd.toml import ConfigError, document

#: The full count and the level of each semaphore, by name.
Config = dict[str, tuple[int, int]]


def read(path: Path) -> Config:
    """
    Read a file. Unknown keys are left to others.

    :raises ConfigError: with everything that is wrong with it.
    """
    table = document(path).get("semaphores", {})
    errors: list[str] = []
    config: Config = {}
    if not isinstance(table, dict):
        errors.append(f"semaphores must be a table, such as [semaphores] and A = 1, not {table!r}")
        table = {}
    for name, value in table.items():
        full_count, level = (
            (value.get("max"), value.get("level", 0)) if isinstance(value, dict) else (value, 0)
        )
        if not _is_integer(full_count, 63):
            errors.append(f"semaphores.{name} must be a whole number, or have one as max, not {full_count!r}")
        elif not _is_integer(level, 31):
            errors.append(f"level of semaphores.{name} must be a whole number, not {level!r}")
        else:
            config[name] = full_count, level
    if errors:
        raise ConfigError([f"{path}: {each}" for each in errors])
    return config


def _is_integer(value: object, bits: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**bits) <= value < 2**bits
