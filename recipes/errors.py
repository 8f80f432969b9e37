"""Errors that a user can fix, and the exit codes of every amlaunch process."""

from __future__ import annotations

OK = 0
FAILED = 1
BAD_INPUT = 2
"""The recipe, the command line or the machine cannot do what you asked: a retry changes nothing."""
HANG = 70
"""A rank made no progress for too long and ended itself; a retry may succeed (``EX_SOFTWARE``)."""
RESUMABLE = 75
"""Stopped on request with everything saved (``EX_TEMPFAIL``): the same command continues from there."""
INTERRUPTED = 130
"""Ended at once by Ctrl-C (128 plus the signal's number, as shells report it)."""


class BadInput(Exception):
    """The user's input cannot work; the message names the value, its place, and what to write instead."""
