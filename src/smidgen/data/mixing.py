"""Several sources in one training set: with weights, shares of tokens; and a part held out for evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mix(lengths: np.ndarray, source: np.ndarray, weights: Sequence[float], *, seed: int) -> np.ndarray:
    """Choose rows so that each source gives its share of the tokens.

    The mixture has about as many tokens as all sources together. A source gives all its rows as often as its share
    holds them, and for the rest a random choice of them.

    Args:
        lengths: tokens of each row.
        source: of each row, the index of its source in `weights`.
        weights: shares, up to a common factor.

    Returns:
        Indices of rows, in the order of the sources; a row of a small source with a large share is in it several times.
    """
    random = np.random.default_rng(seed)
    total, whole = int(lengths.sum()), sum(weights)
    chosen = []
    for index, weight in enumerate(weights):
        rows = np.flatnonzero(source == index)
        wanted = total * weight / whole
        times = int(wanted // max(1, lengths[rows].sum()))
        rest = wanted - times * lengths[rows].sum()
        shuffled = random.permutation(rows)
        ends = np.cumsum(lengths[shuffled])
        part = shuffled[: int(np.searchsorted(ends, rest, side="right"))]
        chosen += [np.repeat(rows, times), np.sort(part)]
    return np.concatenate(chosen)


def held_out(count: int, size: float | int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split `count` rows: indices of the rows kept and of the rows held out, both rising.

    Args:
        size: a share below 1, or a number of rows.
    """
    wanted = max(1, round(count * size)) if size < 1 else int(size)
    shuffled = np.random.default_rng(seed).permutation(count)
    return np.sort(shuffled[wanted:]), np.sort(shuffled[:wanted])
