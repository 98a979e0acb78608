"""
TOML files, read or found wrong in one sentence each.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

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


def document(path: Path) -> dict[str, Any]:
    """
    What a file says.

    :raises ConfigError: if it cannot be read, or is no TOML.
    """
    if tomllib is None:
        raise ConfigError([f"{path}: files need tomli on this Python: pip install 'connlimit[config]'"])
    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise ConfigError([f"{path}: the file cannot be read: {error.strerror}"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError([f"{path}: this is no TOML: {error}"]) from None
