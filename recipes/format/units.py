"""Parse counts, times and memory sizes as a recipe writes them, and the types of keys that hold them."""

from __future__ import annotations

import re
from typing import Annotated, Any

SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
COUNT_TEXT = "a count such as 500M or 1.5B"
POSITIVE_COUNT_TEXT = f"{COUNT_TEXT}, at least 1"
TIME_TEXT = "a time such as 90 (minutes), 04:00:00 or 1-12:00:00"
MIN_MEMORY_KB = 16 << 10
"""Python alone needs more; ``4`` is 4M to Slurm, where 4G is meant."""
MEMORY_TEXT = "memory such as 64G or 900M (an integer with K, M, G or T, at least 16M; 0 is all of a node)"
KB_PER_UNIT = {"K": 1, "M": 1 << 10, "G": 1 << 20, "T": 1 << 30}
TIME_FORMS = (
    r"(?P<minutes>\d+)(:(?P<seconds>[0-5]?\d))?",
    r"(?P<hours>\d+):(?P<minutes>[0-5]?\d):(?P<seconds>[0-5]?\d)",
    r"(?P<days>\d+)-(?P<hours>[01]?\d|2[0-3])(:(?P<minutes>[0-5]?\d)(:(?P<seconds>[0-5]?\d))?)?",
)
SECONDS_PER_UNIT = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}


def parse_count(value: Any) -> int:
    """Return ``500M``, ``1.5B``, ``2_000`` or an integer as an int; suffixes are decimal, as in the guide's options.

    Raises ValueError for anything else, negative numbers and fractions of one included.
    """
    if isinstance(value, bool):
        raise ValueError(COUNT_TEXT)
    text = str(value).strip()
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?(?:[eE][+]?\d+)?)\s*([KMBTkmbt]?)", text)
    if match is None or len(str(value)) >= 30 or float(match[1]) >= 1e30:
        raise ValueError(COUNT_TEXT)

    multiple = SUFFIXES[match[2].upper()]
    number = float(match[1]) * multiple
    is_integer_text = "." not in match[1] and "e" not in match[1].lower()
    count = int(match[1].replace("_", "")) * multiple if is_integer_text else round(number)
    # Above 2**53 a float cannot tell neighbouring integers apart.
    if count == number or abs(number) > 2**53:
        return count
    raise ValueError(COUNT_TEXT)


def parse_positive_count(value: Any) -> int:
    """Return a count of at least 1, as :func:`parse_count` reads it. Raises ValueError for anything else."""
    try:
        count = parse_count(value)
    except ValueError:
        count = 0
    if count < 1:
        raise ValueError(POSITIVE_COUNT_TEXT)
    return count


def parse_minutes(value: Any) -> int:
    """Return one of Slurm's time formats (sbatch(1), ``--time``) as minutes, rounded up.

    The formats are minutes, ``MM:SS``, ``HH:MM:SS``, ``D-HH``, ``D-HH:MM`` and ``D-HH:MM:SS``; only the first number
    is unlimited. Raises ValueError for anything else, and for zero, which Slurm takes as no limit.
    """
    text = "" if isinstance(value, bool) else str(value).strip()
    matches = (re.fullmatch(form, text, re.ASCII) for form in TIME_FORMS)
    match = next((match for match in matches if match), None)
    numbers = match.groupdict() if match else {}
    seconds = sum(int(number or 0) * SECONDS_PER_UNIT[unit] for unit, number in numbers.items())
    if not seconds or seconds >= 60 * 2**31:
        raise ValueError(TIME_TEXT)
    return -(-seconds // 60)


def parse_memory(value: Any) -> str:
    """Return memory in Slurm's form (sbatch(1), ``--mem``): an integer and K, M (default), G or T; 0: all of a node.

    Raises ValueError for anything else.
    """
    text = "" if isinstance(value, bool) else str(value).strip().upper()
    if not re.fullmatch(r"[0-9]{1,15}[KMGT]?", text):
        raise ValueError(MEMORY_TEXT)
    unit = text[-1] if text[-1] in KB_PER_UNIT else ""
    if 0 < int(text.removesuffix(unit)) * KB_PER_UNIT[unit or "M"] < MIN_MEMORY_KB:
        raise ValueError(MEMORY_TEXT)
    return text


Count = Annotated[int, parse_count]
PositiveCount = Annotated[int, parse_positive_count]
Minutes = Annotated[int, parse_minutes]
Memory = Annotated[str, parse_memory]
Positive = Annotated[int, "positive"]
Natural = Annotated[int, "natural"]
AboveZero = Annotated[float, "positive"]
NotNegative = Annotated[float, "natural"]
"""Neither of the two allows infinity or NaN."""
