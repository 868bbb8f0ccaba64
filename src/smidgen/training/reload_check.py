"""Run as a process of its own: loads what a run has saved and prints the losses of a few rows.

It reads one JSON object from standard input: ``base`` and ``adapter`` (folders; no adapter: null), ``dtype``,
``device``, ``threads`` and ``rows`` (pairs of token ids and which of them are supervised).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from smidgen.data.packing import IGNORED, Batch
from smidgen.models.load import load_model
from smidgen.models.peft_model import PeftModel
from smidgen.models.scores import token_losses


@torch.no_grad()
def row_losses(model: nn.Module, rows: Sequence[tuple[list[int], list[bool]]]) -> list[float]:
    """The mean loss of each row, computed one row at a time."""
    device = next(model.parameters()).device
    losses = []
    for ids, supervised in rows:
        tokens = torch.tensor([ids])
        labels = tokens.masked_fill(~torch.tensor([supervised]), IGNORED)
        labels[:, 0] = IGNORED
        batch = Batch(tokens, labels, None, None, [0], int((labels != IGNORED).sum()))
        losses.append(token_losses(model, batch.to(device))[0].mean().item())
    return losses


def main() -> None:
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    say = lambda line: print(line, file=sys.stderr)  # noqa: E731
    model, _ = load_model(Path(request["base"]), request["dtype"], device=torch.device(request["device"]), say=say)
    if request["adapter"]:
        PeftModel.from_pretrained(model, Path(request["adapter"]))
    print(json.dumps(row_losses(model.eval(), request["rows"])))


if __name__ == "__main__":
    main()
