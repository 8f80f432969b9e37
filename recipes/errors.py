"""Errors that a user can fix, the nearest valid name, and the exit codes of every amlaunch process."""

from __future__ import annotations

from collections.abc import Iterable

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

MAX_LISTED_NAMES = 12
MIN_SIMILARITY = 0.65
"""Minimum ``difflib`` ratio of a hint: ``tarin`` finds ``train`` (0.8), ``plot`` does not find ``export`` (0.6)."""


class BadInput(Exception):
    """The user's input cannot work; the message names the value, its place, and what to write instead."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a clause that names the valid name nearest to ``word``, or lists the valid names if none is near.

    Looks for the same name in another case, then for a common alias (``lr`` means ``optimizer.lr``), then for a
    similar spelling. For a Slurm setting, the clause points to the cluster profile.
    """
    import difflib  # imported here because it slows down every start

    from amlaunch.recipes.key_aliases import RECIPE_SECTION, cluster_profile_hint, resolve_alias

    names = sorted({str(name) for name in known})
    if not names:
        return "no names are valid here"

    same = next((name for name in names if name.lower() == word.lower()), None)
    names_recipe_keys = RECIPE_SECTION in names or f"--{RECIPE_SECTION}" in names
    if same is None and names_recipe_keys and (hint := cluster_profile_hint(word)):
        return hint

    nearest = same or resolve_alias(word, names)
    if nearest is None:
        similar = difflib.get_close_matches(word, names, n=1, cutoff=MIN_SIMILARITY)
        nearest = similar[0] if similar else None
    if nearest is not None:
        return f"did you mean {nearest!r}?"

    more = ", …" if len(names) > MAX_LISTED_NAMES else ""
    return f"valid names: {', '.join(names[:MAX_LISTED_NAMES])}{more}"
