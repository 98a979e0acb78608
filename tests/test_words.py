"""
Each thing has one name, in the code, the help texts, the log and the documentation.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: What is not written, as regular expressions with a space for any white space, and what is written instead.
RETIRED = {
    # A line is one of text, of a file, of the log or of a command.
    r"\b(in|join|joins|joined|leave|leaves|left) (the |a )?line\b": "queue",
    r"\b(the|waiting|long|short|own) line(?= (is|was|has|of waiting|keeps|gets)\b|[.,;:)]|\s*$)": "queue",
    r"\bwaiting[ -]lines?\b|I?WaitingLine\b": "queue",
    r"\b(a|its|no) place in (the|a) (line|queue)\b": "position",
    r"\b(is|are|was|were) no more\b(?! than)": "has ended, was removed",
    r"\banew\b": "again",
    r"\bherewith\b": "with this",
    r"\blest\b": "so that ... not",
    r"\bby and by\b": "from time to time, step by step",
    r"\b(tell|tells|telling) of\b|\bis told of (in|by)\b": "show, report, say",
    r"\b(whoever|whomever|whosoever)\b": "those who, the one that",
    r"\bso many\b": "this number of, as many as",
    r"\bthe parent orders?\b": "command",
    r"\bMOST_\w+|\{most\b|\bmost=|\bmost: int\b": "max, maximum",
}

FILES = sorted(
    each
    for pattern in (
        "src/connlimit/**/*.py",
        "src/**/*.lua",
        "src/**/*.xml",
        "docs/*.rst",
        "docs/examples/*",
        "*.rst",
        "*.md",
        "setup.cfg",
        "twisted/plugins/*.py",
    )
    for each in ROOT.glob(pattern)
)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_retired_words_are_not_written(file: Path) -> None:
    # Names of tests are listed in the documentation, and are what they are.
    text = re.sub(r"^ *(test_\w+)$", "", file.read_text(), flags=re.MULTILINE)
    # A sentence may go on in the next line of a comment.
    text = re.sub(r"\n *(#:?|--) ", "\n ", text)
    for pattern, instead in RETIRED.items():
        found = re.search(pattern.replace(" ", r"\s+"), text, re.IGNORECASE | re.MULTILINE)
        assert found is None, f"{file.relative_to(ROOT)}: {found[0]!r} should be {instead!r}"


def test_what_is_retired_is_found() -> None:
    for sentence in (
        "the others wait in line",
        "joins the\nline",
        "Whoever comes",
        "it is no more.",
        "so\n many slots",
        "what it tells of itself",
        "a place in the queue",
        "until the line is overloaded",
    ):
        assert any(re.search(p.replace(" ", r"\s+"), sentence, re.IGNORECASE) for p in RETIRED), sentence
    for sentence in (
        "the command line",
        "the first line of a file",
        "one line each",
        "it is no more than a delay",
    ):
        assert not any(re.search(p.replace(" ", r"\s+"), sentence, re.IGNORECASE) for p in RETIRED), sentence
