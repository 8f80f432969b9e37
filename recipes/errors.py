"""Errors that a user can act on, and the exit codes every amlaunch process shares."""

from __future__ import annotations

from collections.abc import Iterable

OK = 0
FAILED = 1
BAD_INPUT = 2
"""The recipe, the command line or the machine cannot do what is asked: trying again changes nothing."""
HANG = 70
"""A rank got nowhere for too long and ended itself; another try may well go on (``EX_SOFTWARE``)."""
GO_ON_LATER = 75
"""Stopped on request with everything saved (``EX_TEMPFAIL``): the same command goes on from there."""
INTERRUPTED = 130
"""Ended at once by Ctrl-C (128 and the signal's number, as a shell says it)."""


class BadInput(Exception):
    """Something the user gave cannot work; the message says what, where, and what to write instead."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence with the nearest of ``known``, or all of them where none is near (at most twelve)."""
    import difflib  # here, for it makes every start slower

    names = sorted({str(name) for name in known})
    same = [name for name in names if name.lower() == word.lower()]
    near = same or difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    if not names:
        return "no keys are known here"
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return f"known here: {shown}"
