"""Tokenising speed: rows per second of smidgen's data path against a bare batched call of the same tokenizer.

The bare call gets the finished texts; smidgen renders the chat template, finds and marks the learned turns, counts and
hashes rows. Both are run in turns, and the best of each is printed.

    python benchmarks/data.py TOKENIZER_FOLDER FILE [--rows 50000] [--repeat 3]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from smidgen.data.formats import Example, convert_rows
from smidgen.data.prepare import RowStore, no_garbage_collection
from smidgen.data.read import read_rows
from smidgen.data.templates import choose_template
from smidgen.data.tokenise import Piece, Tokeniser


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer, local_files_only=True)
    template = choose_template(tokenizer, None, "alpaca")
    found = convert_rows(str(options.file), read_rows(options.file), format=None)
    examples: list[Example] = list(islice(cycle(found.examples), options.rows))
    texts = [chat if isinstance(chat, str) else chat.text for chat in template.render(examples)]
    stop_ids = {tokenizer.eos_token_id}

    def bare() -> None:
        tokenizer(texts, add_special_tokens=False)

    def ours() -> None:
        tokeniser = Tokeniser(
            tokenizer, template, stop_ids=stop_ids, learn_all=False, max_length=1024, on_long="truncate_prompt"
        )
        store = RowStore()
        with no_garbage_collection():  # as in prepare_data
            for pieces in tokeniser.pieces(examples):
                store.add(0, [piece for piece in pieces if isinstance(piece, Piece)])
        store.rows([str(options.file)])

    times = [(timed(bare), timed(ours)) for _ in range(options.repeat)]
    best_bare, best_ours = (min(column) for column in zip(*times, strict=True))
    print(f"{options.tokenizer.name}, {options.file.name}, {options.rows:,} rows")
    print(f"  bare tokenizer call {options.rows / best_bare:10,.0f} rows/s")
    print(f"  smidgen             {options.rows / best_ours:10,.0f} rows/s   {best_bare / best_ours:.0%}")


if __name__ == "__main__":
    main()
