"""Calls of a model with several adapters: compositions, rows with their own adapters, adapters made of adapters.

Legend: B rows of a batch.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from smidgen.adapters import attach
from smidgen.adapters.attach import BASE, State
from smidgen.adapters.base import OnModel
from smidgen.adapters.compose import Chain, Composition, chain_of, links_of, repeat_rows, repeated
from smidgen.adapters.config import CONFIG_NAME, PeftConfig
from smidgen.adapters.files import adapter_folder
from smidgen.adapters.methods.fusion import FusionConfig
from smidgen.errors import AdapterFileError, UsageError, did_you_mean, raise_all
from smidgen.foreign import contained

# The mixin is made into a class only together with a model's own, whose methods it calls.
_Model = transformers.PreTrainedModel if TYPE_CHECKING else object


class Composed(_Model):
    """What an adapted model can do with several adapters in one call; a part of `AdaptedModel`."""

    _adapters: State

    def __call__(self, *args: Any, adapter_names: Sequence[str | Composition] | None = None, **kwargs: Any) -> Any:
        """Call the model.

        Args:
            adapter_names: for each of the B rows its own adapter, or composition ("__base__": none).
        """
        rows, args, kwargs = self._side_by_side(adapter_names, args, kwargs)
        with self._rows(rows):
            return super().__call__(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str | Composition] | None = None, **kwargs: Any) -> Any:
        """As transformers' `generate`; `adapter_names` as in a call."""
        rows, args, kwargs = self._side_by_side(adapter_names, args, kwargs)
        if rows is not None and kwargs.get("num_beams", 1) > 1:
            raise UsageError("adapter_names: rows with their own adapters cannot be combined with beam search")
        with self._rows(rows):
            return super().generate(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def compose(self, composition: Composition, inference_mode: bool = False) -> None:
        """Let adapters answer together, as `composition` says, and train them unless `inference_mode`.

        `Fuse` trains only the adapter that chooses, which it adds where there is none yet. `set_adapter` ends it.

        Raises:
            UsageError: an adapter is not there, or cannot answer so; nothing was changed.
            TargetError: what an adapter does cannot be fused.
        """
        model: Any = self
        branches = composition.branches()
        with self._all_or_none():
            for names in composition.fused():
                self._check_names(names)
                if (name := ",".join(names)) not in self._adapters.configs:
                    model.add_adapter(name, FusionConfig(adapters=names))
            self._check_chains(branches, type(composition).__name__, apart=len(branches) > 1)
        names = list(dict.fromkeys(name for chain in branches for name in links_of(chain)))
        model.set_adapter(names, inference_mode)
        if branches != [tuple(names)]:
            self._adapters.branches = branches

    def _side_by_side(
        self, adapter_names: Sequence[str | Composition] | None, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[list[Chain] | None, tuple, dict[str, Any]]:
        """What answers each row of a call, None where all are answered alike, and the call, with rows repeated."""
        state = self._adapters
        if adapter_names is not None:
            return [() if name == BASE else chain_of(name) for name in adapter_names], args, kwargs
        if len(state.branches) < 2 or not state.enabled or state.rows is not None:
            return None, args, kwargs
        count, args, kwargs = repeat_rows(len(state.branches), args, kwargs)
        return [chain for chain in state.branches for _ in range(count)], args, kwargs

    @contextmanager
    def _rows(self, rows: list[Chain] | None) -> Iterator[None]:
        state = self._adapters
        if rows is None:
            yield
            return
        self._check_chains(list(dict.fromkeys(rows)), "adapter_names", apart=True)
        if getattr(self, "is_gradient_checkpointing", False) and self.training and torch.is_grad_enabled():
            raise UsageError("adapter_names: not together with gradient checkpointing, which calls layers again later")
        if attach.merged_names(self):
            raise UsageError("adapter_names: adapters are merged into the weights; call unmerge_adapter() first")
        before, state.rows = state.rows, rows
        try:
            yield
        finally:
            state.rows = before

    def _check_chains(self, chains: list[Chain], place: str, apart: bool) -> None:
        """Raise `UsageError` where adapters are not there, or cannot answer in an average, or for some rows alone."""
        names = [name for chain in chains for name in links_of(chain)]
        self._check_names(names)
        parts = {name: [adapter for _, adapter in attach.adapters_of(self, name)] for name in names}
        averaged = [links_of((link,)) for chain in chains for link in chain if not isinstance(link, str)]
        problems = [f"{place}: '{name}' stands in it twice" for chain in chains for name in repeated(chain)]
        problems += [
            f"{place}: '{name}' stands before the rows of the whole model; an average is of what single layers answer"
            for name in dict.fromkeys(name for names in averaged for name in names)
            if any(isinstance(adapter, OnModel) for adapter in parts[name])
        ]
        whole = {type(adapter).__name__ for own in parts.values() for adapter in own if not adapter.per_row}
        if apart and whole:
            problems.append(f"{place}: {', '.join(sorted(whole))} works on a whole batch, not row by row")
        raise_all(UsageError, problems)

    def _check_names(self, names: list[str]) -> None:
        there = self._adapters.configs
        for name in names:
            if name not in there:
                raise UsageError(
                    f"adapter: no '{name}'{did_you_mean(name, there)} There are: {', '.join(there) or 'none'}."
                )

    # --- adapters made of adapters --------------------------------------------------------------------------------

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """Take the adapters off again that were attached inside the block, if it fails."""
        before = set(self._adapters.configs)
        try:
            yield
        except Exception:
            for name in self._adapters.configs.keys() - before:
                attach.detach(self, self._adapters, name)
            raise

    def _take_in(self, config: Any, folder: Path | None = None) -> None:
        """Attach the adapters that a fusion names as folders; its configuration names adapters of the model then.

        Args:
            folder: where the fusion's own file is; those that it fuses are in folders of their names there.

        Raises:
            AdapterFileError: there is no such adapter, or it is a fusion itself.
        """
        model: Any = self
        names = []
        for entry in getattr(config, "adapters", ()):
            if folder is None and entry in self._adapters.configs:
                names.append(entry)
                continue
            place = Path(entry) if folder is None else contained(folder, entry, AdapterFileError)
            place = place / "adapter" if (place / "adapter" / CONFIG_NAME).is_file() else place  # a run's folder
            place = adapter_folder(place)
            if isinstance(PeftConfig.from_pretrained(place), FusionConfig):
                raise AdapterFileError(f"{place}: is a fusion itself; name the adapters that it fuses")
            name = self._free_name(place)
            model.load_adapter(place, name)
            names.append(name)
        if names:
            config.adapters = names

    def _free_name(self, folder: Path) -> str:
        """A name for the adapter of a folder that no other has: the folder's, or the run's that it is in."""
        folder = folder.resolve()
        named = folder.parent.name if folder.name == "adapter" else folder.name
        name = re.sub(r"[^\w-]+", "_", named) or "adapter"
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        return next(name for name in names if name not in self._adapters.configs)
