"""Numbers and names as people read them."""

import os
import re
import sys
from typing import Final

#: As coreutils have them: K and KiB are 1024, KB is 1000.
_UNITS: Final = "KMGT"


def human(count: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def parse_size(text: str) -> int:
    """Bytes, from a number with or without a unit. Raises ValueError."""
    match = re.fullmatch(rf"(\d+(?:\.\d+)?) ?(?:([{_UNITS}])(i?B)?|B)?", text.strip(), re.IGNORECASE | re.ASCII)
    if match is None:
        raise ValueError(f"{text!a} is not a number of bytes such as 500000, 100M (MiB) or 100MB")
    number, unit, rest = match.groups()
    base = 1000 if (rest or "").upper() == "B" else 1024
    power = _UNITS.index(unit.upper()) + 1 if unit else 0
    return round(float(number) * float(base**power))


def duration(seconds: float) -> str:
    """A time span with its unit."""
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


def printable(name: str) -> str:
    """A file name for a terminal: bytes that are no text, and control characters, are shown escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def write_line(line: str) -> None:
    """Print a line whose file names keep their bytes, whatever the locale."""
    sys.stdout.flush()
    sys.stdout.buffer.write(os.fsencode(line) + b"\n")
    sys.stdout.buffer.flush()
