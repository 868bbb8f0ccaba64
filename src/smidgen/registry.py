"""What can be chosen by name: the name, where its class lives, a line about it and its paper.

Listing needs no torch; a class is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from smidgen.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Entry:
    """One name of a registry. `target` is ``module:Class``; `example`: values of fields that have no default."""

    name: str
    target: str
    summary: str
    paper: str = ""
    example: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Any:
        """Import and answer the class."""
        module, _, attribute = self.target.partition(":")
        return getattr(importlib.import_module(module), attribute)


def _table(*entries: Entry) -> dict[str, Entry]:
    return {entry.name: entry for entry in entries}


METHODS = _table(
    Entry(
        "lora",
        "smidgen.adapters.methods.lora:Lora",
        "low-rank update B A beside each target weight; merges to zero added latency",
        "https://arxiv.org/abs/2106.09685",
    ),
    Entry(
        "ia3",
        "smidgen.adapters.methods.ia3:IA3",
        "learned factors for keys, values and inner activations; a few thousand numbers",
        "https://arxiv.org/abs/2205.05638",
    ),
    Entry(
        "loha",
        "smidgen.adapters.methods.loha:LoHa",
        "element-wise product of two low-rank updates: rank r^2 at LoRA's double price",
        "https://arxiv.org/abs/2108.06098",
    ),
    Entry(
        "lokr",
        "smidgen.adapters.methods.lokr:LoKr",
        "Kronecker product of two small matrices: high rank from few numbers",
        "https://arxiv.org/abs/2309.14859",
    ),
    Entry(
        "vera",
        "smidgen.adapters.methods.vera:Vera",
        "two vectors a layer over random matrices that all layers share",
        "https://arxiv.org/abs/2310.11454",
    ),
    Entry(
        "ln_tuning",
        "smidgen.adapters.methods.ln_tuning:LNTuning",
        "the norms are trained, all else stays",
        "https://arxiv.org/abs/2312.11420",
    ),
    Entry(
        "bitfit",
        "smidgen.adapters.methods.bitfit:BitFit",
        "the biases are trained, all else stays",
        "https://arxiv.org/abs/2106.10199",
    ),
    Entry(
        "oft",
        "smidgen.adapters.methods.oft:OFT",
        "blocks of inputs are rotated: angles between neurons stay",
        "https://arxiv.org/abs/2306.07280",
    ),
    Entry(
        "hra",
        "smidgen.adapters.methods.hra:HRA",
        "a chain of Householder reflections before each target weight",
        "https://arxiv.org/abs/2405.17484",
    ),
    Entry(
        "boft",
        "smidgen.adapters.methods.boft:BOFT",
        "all inputs are rotated, by small blocks in butterfly order",
        "https://arxiv.org/abs/2311.06243",
    ),
    Entry(
        "fourierft",
        "smidgen.adapters.methods.fourierft:FourierFT",
        "a few trained frequencies of each update",
        "https://arxiv.org/abs/2405.03003",
    ),
    Entry(
        "randlora",
        "smidgen.adapters.methods.randlora:RandLora",
        "full-rank update from random matrices that all layers share",
        "https://arxiv.org/abs/2502.00987",
    ),
    Entry(
        "miss",
        "smidgen.adapters.methods.miss:MiSS",
        "groups of inputs share one block of the update",
        "https://arxiv.org/abs/2409.15371",
    ),
    Entry(
        "shira",
        "smidgen.adapters.methods.shira:Shira",
        "a few single entries of each weight: random, the largest, or those that data moves most",
        "https://arxiv.org/abs/2406.13175",
    ),
    Entry(
        "trainable_tokens",
        "smidgen.adapters.methods.trainable_tokens:TrainableTokens",
        "some rows of the embedding are trained",
        example={"token_indices": [0]},
    ),
    Entry("full", "smidgen.adapters.methods.full:Full", "every parameter of the base model is trained"),
    Entry("freeze", "smidgen.adapters.methods.full:Freeze", "the last n layers are trained, the rest stays frozen"),
    Entry(
        "prompt_tuning",
        "smidgen.adapters.methods.prompt_tuning:PromptTuning",
        "the vectors of virtual tokens before every row",
        "https://arxiv.org/abs/2104.08691",
    ),
    Entry(
        "p_tuning",
        "smidgen.adapters.methods.p_tuning:PTuning",
        "a small network that computes the vectors of virtual tokens",
        "https://arxiv.org/abs/2103.10385",
    ),
    Entry(
        "prefix_tuning",
        "smidgen.adapters.methods.prefix_tuning:PrefixTuning",
        "keys and values of virtual tokens in every layer",
        "https://arxiv.org/abs/2101.00190",
    ),
    Entry(
        "p_tuning_v2",
        "smidgen.adapters.methods.prefix_tuning:PrefixTuning",
        "prefix tuning without projection",
        "https://arxiv.org/abs/2110.07602",
    ),
    Entry(
        "adalora",
        "smidgen.adapters.methods.adalora:AdaLora",
        "low-rank updates that share a budget of ranks, spent where it matters most",
        "https://arxiv.org/abs/2303.10512",
    ),
    Entry(
        "bottleneck",
        "smidgen.adapters.methods.bottleneck:Bottleneck",
        "small networks in each block: houlsby, pfeiffer, parallel",
        "https://arxiv.org/abs/1902.00751",
    ),
    Entry(
        "fusion",
        "smidgen.adapters.methods.fusion:Fusion",
        "attention over the outputs of several trained adapters, which stay as they are",
        "https://arxiv.org/abs/2005.00247",
        example={"adapters": ["first", "second"]},
    ),
)

LORA_INITS = _table(
    Entry("default", "smidgen.adapters.init.default:initialise", "A uniform, B zero"),
    Entry("gaussian", "smidgen.adapters.init.gaussian:initialise", "A normal, B zero"),
    Entry("random", "smidgen.adapters.init.random:initialise", "A and B random: not the base model at the start"),
    Entry("orthogonal", "smidgen.adapters.init.orthogonal:initialise", "A and B non-zero with B A = 0"),
    Entry("pissa", "smidgen.adapters.init.pissa:initialise", "principal part", "https://arxiv.org/abs/2404.02948"),
    Entry("olora", "smidgen.adapters.init.olora:initialise", "QR of the weight", "https://arxiv.org/abs/2406.01775"),
    Entry("eva", "smidgen.adapters.init.eva:initialise", "main inputs", "https://arxiv.org/abs/2410.07170"),
    Entry("corda", "smidgen.adapters.init.corda:initialise", "main outputs", "https://arxiv.org/abs/2406.05223"),
    Entry("lora_ga", "smidgen.adapters.init.lora_ga:initialise", "first gradient", "https://arxiv.org/abs/2407.05000"),
    Entry("loftq", "smidgen.adapters.init.loftq:initialise", "loss of storing", "https://arxiv.org/abs/2310.08659"),
)


OBJECTIVES = _table(
    Entry("sft", "smidgen.training.objectives:Objective", "the answers of chats"),
    Entry("pretrain", "smidgen.training.objectives:Objective", "plain text"),
    Entry(
        "dpo",
        "smidgen.training.preference:Preference",
        "pairs of answers: DPO and its kin",
        "https://arxiv.org/abs/2305.18290",
    ),
    Entry("kto", "smidgen.training.preference:Kto", "answers labelled good or bad", "https://arxiv.org/abs/2402.01306"),
    Entry("reward", "smidgen.training.reward:Reward", "a score for answers, from pairs"),
    Entry(
        "process_reward",
        "smidgen.training.reward:ProcessReward",
        "a score for each step of a solution",
        "https://arxiv.org/abs/2305.20050",
    ),
)

PREFERENCE_LOSS = Entry(
    "preference", "smidgen.losses.preference:problems_of", "what is wrong with the preference part of a recipe"
)


def lookup(table: dict[str, Entry], name: str, kind: str) -> Entry:
    """Answer the entry called `name`.

    Raises:
        UsageError: there is no such entry; the message lists what there is.
    """
    if name not in table:
        raise UsageError(f"{kind}: no '{name}'{did_you_mean(name, table)} There are: {', '.join(table)}.")
    return table[name]
