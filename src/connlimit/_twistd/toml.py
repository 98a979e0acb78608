"""
TOML files, read or found wrong in one sentence each.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from connlimit._system.files import contents

if sys.version_info >= (3, 11):
    import tomllib
else:
    try:
        import tomli as tomllib
    except ImportError:
        tomllib = None


class ConfigError(Exception):
    """
    The file cannot be used.

    :ivar errors: all that is wrong with it, a sentence each.
    """

    def __init__(self, errors: list[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = errors


def source(path: Path) -> str:
    """
    The text of a file.

    :raises ConfigError: if it cannot be read, or is no text.
    """
    try:
        return contents(path).decode()
    except OSError as error:
        raise ConfigError([f"{path}: the file cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: this is not TOML: {error}"]) from None


def document(path: Path, text: str | None = None) -> dict[str, Any]:
    """
    What a file says.

    :param text: its text, if it was read already.
    :raises ConfigError: if it cannot be read, or is no TOML.
    """
    if tomllib is None:
        raise ConfigError([f"{path}: files need tomli on this Python: pip install 'connlimit[config]'"])
    try:
        return tomllib.loads(source(path) if text is None else text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError([f"{path}: this is not TOML: {error}"]) from None
