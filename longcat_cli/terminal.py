"""Makes text safe to print to a terminal."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    """The text, with control characters other than ends of lines and tabs replaced."""
    return "".join(each if _is_harmless(each) else "\N{REPLACEMENT CHARACTER}" for each in text)


def _is_harmless(character: str) -> bool:
    # Python calls no space printable but the ASCII one, and Chinese has others.
    return character.isprintable() or character in "\n\t" or unicodedata.category(character) == "Zs"
