"""How the speed of a LoRA step falls with the size of the model: shapes of Qwen2 with random weights in bfloat16.

    python benchmarks/scale.py [--rows 2] [--length 256] [--repeat 3]

If nothing but the size mattered, tokens a second times parameters would be the same in every line.
"""

from __future__ import annotations

import argparse
import gc
from contextlib import ExitStack
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from smidgen.training.step import Task, compare, make_step

# hidden, intermediate, layers, heads, key and value heads; the last two are Qwen2-0.5B and Qwen2-1.5B
SHAPES = ((576, 1536, 30, 9, 3), (896, 2432, 24, 14, 2), (896, 4864, 24, 14, 2), (1536, 8960, 28, 12, 2))
VOCABULARY = 49_152  # the same for all, so that the head does not stand out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    task = Task(options.rows, options.length, 0.05)
    print(f"{'parameters':>10} {'tokens/s':>9} {'parameters x tokens/s':>22} {'share of limit':>15}")
    for hidden, intermediate, layers, heads, kv_heads in SHAPES:
        config = Qwen2Config(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=VOCABULARY,
            tie_word_embeddings=True,
            dtype=torch.bfloat16,
        )
        model: Any = Qwen2ForCausalLM._from_config(config)
        count = sum(parameter.numel() for parameter in model.parameters())
        with ExitStack() as stack:
            step = make_step("smidgen", model, task, stack, say=lambda line: None)
            results, _ = compare({"smidgen": step}, model, task, options.repeat)
        found = results["smidgen"]
        rate = found.tokens_per_second
        print(f"{count / 1e6:9.0f}M {rate:9.1f} {count * rate / 1e9:21.1f}G {found.share:15.1%}", flush=True)
        del model, step
        gc.collect()


if __name__ == "__main__":
    main()
