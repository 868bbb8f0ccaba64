"""The few exception types, each with the exit code that the command line answers with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST = 50  # mistakes told at once
_LONGEST_WORD = 100  # whose nearest spelling is looked for


class SmidgenError(Exception):
    """Base of all errors that are told to the user as a plain message, without a traceback."""

    exit_code = 1


class UsageError(SmidgenError):
    """What was asked for cannot be done as it was asked; nothing was changed or spent."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe is wrong: unknown fields, bad values, bad YAML."""


class DataError(UsageError):
    """A data file or one of its rows is wrong."""


class ModelError(UsageError):
    """A model cannot be found, read or used."""


class TargetError(UsageError):
    """The modules that an adapter asks for are not in the model."""


class AdapterFileError(UsageError):
    """An adapter's files do not fit the model, or are not adapter files."""


class MergeError(SmidgenError):
    """A merge was refused because the merged model would not answer as the adapted one."""


class TrainingStopped(SmidgenError):
    """A guard stopped the training; what was learned so far is kept."""

    exit_code = 3


class GateFailed(SmidgenError):
    """A gate of a flow does not hold, or a proof in it failed; what was made so far is kept."""

    exit_code = 4


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Answer ``"; did you mean 'x'?"`` for the nearest spelling among `candidates`, or an empty string."""
    if len(word) > _LONGEST_WORD:
        return ""
    near = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def raise_all(error: type[SmidgenError], problems: list[str]) -> None:
    """Raise one `error` with a line for each problem; do nothing when there is none."""
    if problems:
        more = [f"... and {len(problems) - _MOST:,} more"] if len(problems) > _MOST else []
        raise error("\n".join([*problems[:_MOST], *more]))
