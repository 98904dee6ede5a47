"""Names of runs and layers as texts of a picture."""

from __future__ import annotations


def shortened(name: str, most: int) -> str:
    """At most `most` characters, with the middle left out."""
    if len(name) > most:
        name = f"{name[: (most - 1) // 2]}…{name[len(name) - most // 2 :]}"
    return plain(name)


def plain(text: str) -> str:
    """As matplotlib shows it unchanged: it reads formulas between dollars, and hides "_name"."""
    text = "".join(char if char.isprintable() else "?" for char in text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
