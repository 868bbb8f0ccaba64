"""How the values of one update become one loss: the only place that averages.

The mean is taken over the whole update, never over a micro-batch. So the way an update is cut into micro-batches, and
the way it is spread over processes, changes neither the loss nor its gradient.
"""

from __future__ import annotations

import torch


def mean_share(values: torch.Tensor, count: int) -> torch.Tensor:
    """The part that `values`, a piece of the update, add to the mean over the update's `count` values.

    Args:
        values: (N,) losses of one micro-batch.
        count: how many values the whole update has (for language modelling: its supervised tokens), at least 1.

    Returns:
        A scalar; the shares of all pieces add up to the mean, and their gradients to the mean's gradient.
    """
    return values.sum() / count
