"""The methods of the registry side by side: the facts of their classes, and what each would train in a given model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from smidgen.errors import TargetError
from smidgen.kernels.dequantize import Kind
from smidgen.models.peft_model import get_peft_model
from smidgen.models.shapes import model_of
from smidgen.registry import METHODS, Entry

HEADER = ("numbers", "share", "merges", "stored bases", "latency", "files")


@dataclass(frozen=True)
class Line:
    """One method.

    trained: the numbers that it trains with its default configuration, of `total`; None: it is not counted.
    refused: why it cannot be counted.
    """

    entry: Entry
    trained: int | None = None
    total: int = 0
    refused: str = ""

    def cells(self) -> list[str]:
        """What stands below each name of `HEADER`; the first two are empty where no model was given."""
        method = self.entry.load()
        count = "none" if self.refused else f"{self.trained:,}" if self.trained is not None else ""
        share = f"{100 * self.trained / self.total:.3g} %" if self.trained is not None else ""
        facts = ("", "no", "none", "the whole model")  # of what trains the base itself
        if not hasattr(method, "select"):
            merges = "yes" if method.is_mergeable() else "no"
            facts = (merges, ", ".join(get_args(Kind)), method.latency, method.config_class.files)
        return [count, share, *facts]


def overview(config: PretrainedConfig | None) -> list[Line]:
    """A line for each method, with what it would train in a model of this configuration; nothing takes memory."""
    if config is None:
        return [Line(entry) for entry in METHODS.values()]
    with FakeTensorMode():
        model = model_of(config, torch.float32)
        total = sum(parameter.numel() for parameter in model.parameters())
        lines = []
        for entry in METHODS.values():
            try:
                lines.append(Line(entry, _trained(model, entry), total))
            except TargetError as error:
                lines.append(Line(entry, refused=str(error).splitlines()[0]))
    return lines


def _trained(model: Any, entry: Entry) -> int:
    method = entry.load()
    settings = method.config_class(**entry.example)
    if hasattr(method, "select"):
        chosen = set(method.select(model, settings))
        return sum(parameter.numel() for name, parameter in model.named_parameters() if name in chosen)
    for name in getattr(settings, "adapters", ()):  # what it fuses
        get_peft_model(model, METHODS["bottleneck"].load().config_class(), name)
    get_peft_model(model, settings)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    model.unload()
    return trained


def markdown(lines: Sequence[Line]) -> str:
    """The table in Markdown; the name of a method links to its paper."""
    rows = [["method", "what is trained", *HEADER], ["---"] * 2 + ["--:"] * 2 + ["---"] * 4]
    for line in lines:
        name, paper = f"`{line.entry.name}`", line.entry.paper
        rows.append([f"[{name}]({paper})" if paper else name, line.entry.summary, *line.cells()])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
