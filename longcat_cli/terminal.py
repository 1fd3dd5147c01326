"""What of a text a terminal may be shown."""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    """With every character that a terminal would obey replaced, but for ends of lines and tabs."""
    return "".join(each if _is_harmless(each) else "\N{REPLACEMENT CHARACTER}" for each in text)


def _is_harmless(character: str) -> bool:
    # Python calls no space printable but the ASCII one, and Chinese has others.
    return character.isprintable() or character in "\n\t" or unicodedata.category(character) == "Zs"
