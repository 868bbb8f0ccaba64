"""Which rows make an update, and how an update becomes batches: packed, or padded and grouped by length.

Letters: B rows, T tokens.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from smidgen.data.rows import TokenRow, TokenRows
from smidgen.errors import DataError

if TYPE_CHECKING:
    import torch

    from smidgen.kernels.attention import Spread

IGNORED = -100  # a label without loss
_GROUP = 50  # updates whose rows are sorted by length together
_WORTH = 0.95  # of its tokens: a batch that is hardly smaller with common beginnings once keeps rows whole
_ALIKE = 0.9  # of the longest row of a padded batch: shorter rows go into the next batch


@dataclass(frozen=True)
class Branches:
    """How the rows of a packed batch share what they begin with: each common beginning stands there once.

    Where tokens attend, and only there, each row stands whole, so that it sees its beginning and no other row.

    Attributes:
        spread: the tokens as they attend. offsets: (S + 1,) int64, where rows begin and end there.
        before: (T,) int64, the token before each in its row. row: (T,) int64, the first row that a token is of.
    """

    spread: Spread
    offsets: torch.Tensor
    before: torch.Tensor
    row: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """What a model computes at once.

    input_ids (B, T) int64; labels (B, T) int64, not shifted, -100 where there is no loss (as at a row's first token).
    attention_mask (B, T) int64, 1 for tokens and 0 for padding; None where there is no padding.
    position_ids (B, T) int64, starting at 0 with every row of a packed batch (B = 1); None in a padded batch.
    rows: the indices of its rows. supervised: how many labels carry loss. images: the paths of all rows' images.
    branches: how rows share beginnings; None: each row stands whole.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    rows: list[int]
    supervised: int
    images: tuple[str, ...] = ()
    branches: Branches | None = None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        """Answer the batch with its tensors on that device."""
        tensors = {f.name: value for f in fields(self) if hasattr(value := getattr(self, f.name), "to")}
        return replace(self, **{name: tensor.to(device, non_blocking=non_blocking) for name, tensor in tensors.items()})

    def whole(self) -> Self:
        """Answer the batch with each row whole: what carries loss stays in its order."""
        if self.branches is None:
            return self
        named = {name: getattr(self, name) for name in ("input_ids", "labels", "position_ids")}
        return replace(self, branches=None, **{name: x[:, self.branches.spread.tokens] for name, x in named.items()})


def epoch_plan(
    lengths: Sequence[int] | np.ndarray, batch_size: int, *, seed: int, epoch: int, grouped: bool = True
) -> list[list[int]]:
    """Cut an epoch into updates of `batch_size` rows: every row once, the last update may hold fewer.

    The rows are permuted by `seed` and `epoch` alone. With `grouped`, rows of like length share an update, so that
    padding is little; the updates are in random order. The first epoch starts with the update of the longest row: what
    does not fit into memory fails at once.
    """
    lengths = np.asarray(lengths)
    count = len(lengths)
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(count)
    full = count - count % batch_size
    if count and full:
        longest = int(np.flatnonzero(order == np.argmax(lengths))[0])
        if longest >= full:  # keep it out of the smaller last update
            order[[0, longest]] = order[[longest, 0]]
    updates = []
    for start in range(0, full, _GROUP * batch_size):
        group = order[start : min(full, start + _GROUP * batch_size)]
        if grouped:
            group = group[np.argsort(lengths[group], kind="stable")]
        updates += [group[at : at + batch_size] for at in range(0, len(group), batch_size)]
    updates = [updates[index] for index in random.permutation(len(updates))]
    if epoch == 0 and updates:
        first = max(range(len(updates)), key=lambda index: int(lengths[updates[index]].max()))
        updates.insert(0, updates.pop(first))
    if full < count:
        updates.append(order[full:])
    return [update.tolist() for update in updates]


def micro_batches(
    rows: TokenRows, update: Sequence[int], *, token_budget: int, packing: bool, pad_id: int, sharing: bool = False
) -> list[Batch]:
    """Cut an update into batches of at most `token_budget` tokens, padding included; the largest comes first.

    Packed: rows stand one behind the other in one sequence, `position_ids` start anew with each, and there is no
    attention mask: transformers then keeps the rows apart. Padded: rows of like length share a batch, padded behind.
    Rows with images are never packed. Sharing: see `Branches`; the budget is for whole rows.

    Raises:
        DataError: a row is longer than the budget.
    """
    groups = cut(rows, update, token_budget=token_budget, packing=packing)
    how = {"packing": packing, "pad_id": pad_id, "sharing": sharing, "most": token_budget}
    return [batch_of([rows[index] for index in group], group, **how) for group in groups]


def cut(
    rows: Any, update: Sequence[int], *, token_budget: int, packing: bool, padded: Mapping[int, int] | None = None
) -> list[list[int]]:
    """The indices of `update` in groups of at most `token_budget` tokens; the largest comes first.

    Args:
        rows: of any kind that has `lengths` and tells where each is from.
        padded: of each index, the tokens that count where rows are padded; by default the row's. A row that is within
            the budget but not with its padding is a group of its own.

    Raises:
        DataError: a row is longer than the budget.
    """
    lengths = {index: int(rows.lengths[index]) for index in update}
    long = [index for index in update if lengths[index] > token_budget]
    if long:
        raise DataError(
            f"{rows[long[0]].where}: the row has {lengths[long[0]]} tokens, more than the {token_budget} computed at "
            "once; raise micro_batch_tokens or lower max_length"
        )
    if not packing and padded is not None:
        lengths = {index: padded[index] for index in update}
    longest_first = sorted(update, key=lambda index: -lengths[index])
    return (_best_fit if packing else _alike)(longest_first, lengths, token_budget)


def batch_of(
    rows: list[TokenRow], indices: Sequence[int], *, packing: bool, pad_id: int, sharing: bool = False, most: int = 0
) -> Batch:
    """Rows behind each other in one sequence, with common beginnings once where `sharing`; or padded to the longest.

    Args:
        indices: of the rows, or of what several of them belong to.
        most: tokens up to which a sequence may be filled with padding, see `_step`.
    """
    if not packing:
        return _padded(rows, indices, pad_id)
    make = _shared if sharing else _packed
    batch = make(rows, indices)
    length = batch.input_ids.numel()
    missing = -length % _step(length)
    if not missing or length + missing > most:
        return batch
    padding = TokenRow(np.full(missing, pad_id), np.zeros(missing, dtype=bool), "")
    return make([*rows, padding], indices)


def _step(length: int) -> int:
    """What a sequence is filled to a multiple of: then there are 16 lengths from one power of two to the next.

    For each length the libraries that multiply keep code and memory, some 10 MB for a model of 135M parameters.
    """
    return max(8, 1 << max(0, length.bit_length() - 5))


def _best_fit(order: Sequence[int], lengths: dict[int, int], budget: int) -> list[list[int]]:
    """Best-fit decreasing: each row goes where it leaves the least room. Answer the bins, fullest first."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for index in order:
        at = bisect_left(room, (lengths[index], -1))
        if at < len(room):
            left, place = room.pop(at)
        else:
            left, place = budget, len(bins)
            bins.append([])
        bins[place].append(index)
        insort(room, (left - lengths[index], place))
    return [bins[place] for _, place in room]


def _alike(order: Sequence[int], lengths: dict[int, int], budget: int) -> list[list[int]]:
    """Groups of rows of falling length, as large as the budget lets them be when padded, but of like length."""
    groups = [[order[0]]]
    for index in order[1:]:
        longest = lengths[groups[-1][0]]
        if (len(groups[-1]) + 1) * longest <= budget and lengths[index] >= _ALIKE * longest:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _labels(row: TokenRow) -> np.ndarray:
    labels = np.where(row.supervised, row.input_ids, IGNORED)
    labels[0] = IGNORED
    return labels


def _packed(rows: list[TokenRow], indices: Sequence[int]) -> Batch:
    ids = np.concatenate([row.input_ids for row in rows])
    labels = np.concatenate([_labels(row) for row in rows])
    positions = np.concatenate([np.arange(len(row.input_ids)) for row in rows])
    return _batch(ids[None], labels[None], None, positions[None], indices)


def _shared(rows: list[TokenRow], indices: Sequence[int]) -> Batch:
    """Rows behind each other; what a row begins with, unlearned, as one before it, is not repeated."""
    packed = _packed(rows, indices)
    tokens, before, row = [], [], []
    following: dict[tuple[int, int], int] = {}  # of a token and the id after it, the token that is this
    for number, each in enumerate(rows):
        learned, at = int(np.argmax(each.supervised)), -1
        for position, id_ in enumerate(each.input_ids.tolist()):
            above, known = at, following.get((at, id_)) if position < learned else None
            at = len(before) if known is None else known
            if known is None:
                before.append(above)
                row.append(number)
                if position < learned:
                    following[above, id_] = at
            tokens.append(at)
    if len(before) > _WORTH * len(tokens):
        return packed
    return replace(packed, **_once(packed, np.array(tokens), before, row, [len(each.input_ids) for each in rows]))


def _once(
    packed: Batch, tokens: np.ndarray, before: list[int], row: list[int], lengths: Sequence[int]
) -> dict[str, Any]:
    """The fields of a packed batch in which each token stands once; `tokens`: the one at each place."""
    import torch

    from smidgen.kernels.attention import Spread

    counts, places = np.bincount(tokens), np.argsort(tokens, kind="stable")
    first = np.cumsum(counts) - counts
    repeated = []
    for count in np.unique(counts[counts > 1]):
        several = np.flatnonzero(counts == count)
        their = places[first[several] + np.arange(count)[:, None]]
        repeated.append((torch.from_numpy(several), torch.from_numpy(their)))
    kept = torch.from_numpy(places[first])
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    spread = Spread(torch.from_numpy(tokens), kept, tuple(repeated))
    branches = Branches(spread, offsets, torch.tensor(before), torch.tensor(row))
    named = {name: getattr(packed, name)[:, kept] for name in ("input_ids", "labels", "position_ids")}
    return {"branches": branches, **named}


def _padded(rows: list[TokenRow], indices: Sequence[int], pad_id: int) -> Batch:
    ids = filled_behind([row.input_ids for row in rows], pad_id)
    labels = filled_behind([_labels(row) for row in rows], IGNORED)
    mask = filled_behind([np.ones_like(row.input_ids) for row in rows], 0)
    images = tuple(image for row in rows for image in row.images)
    return replace(_batch(ids, labels, None if mask.all() else mask, None, indices), images=images)


def filled_behind(rows: Sequence[np.ndarray], value: int) -> np.ndarray:
    """Rows of numbers as one array, int64, the shorter ones filled with `value`."""
    array = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for place, row in enumerate(rows):
        array[place, : len(row)] = row
    return array


def _batch(
    ids: np.ndarray, labels: np.ndarray, mask: np.ndarray | None, positions: np.ndarray | None, indices: Sequence[int]
) -> Batch:
    import torch

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64))

    return Batch(
        input_ids=tensor(ids),
        labels=tensor(labels),
        attention_mask=None if mask is None else tensor(mask),
        position_ids=None if positions is None else tensor(positions),
        rows=list(indices),
        supervised=int((labels != IGNORED).sum()),
    )
