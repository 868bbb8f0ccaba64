"""The LoRA code of the documents that describe the field runs with the import changed, and little else.

`EDITS` lists what each block needs: the import, the model and data at hand, and what transformers 5 renamed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import smidgen
from smidgen.models.peft_model import AdaptedModel

IMPORT = ("from peft import", "from smidgen import")

# document: {number of its python block: the edits that it needs}
EDITS: dict[str, dict[int, list[tuple[str, str]]]] = {
    "000": {
        0: [IMPORT, ('"Qwen/Qwen2.5-7B", device_map="auto"', "MODEL")],
        2: [
            IMPORT,
            ('"Qwen/Qwen2.5-7B"', "MODEL"),
            ('"saves/qwen2.5-7b/qlora"', "ADAPTER"),
            ('"models/qwen2.5-7b-merged"', "MERGED"),
        ],
    },
    "001": {
        0: [IMPORT],
        1: [('"Qwen/Qwen1.5-1.8B-Chat"', "MODEL")],
        2: [IMPORT],
        3: [],
        4: [('"path/to/output"', "OUTPUT, max_steps=2, use_cpu=True, report_to='none'"), ("your_dataset", "DATASET")],
        5: [('"path/to/adapter"', "ADAPTER")],
        6: [IMPORT, ('"path/to/adapter"', "ADAPTER"), ('"Qwen/Qwen1.5-1.8B-Chat"', "MODEL")],
        7: [('"cuda"', '"cpu"')],
    },
    "004": {
        1: [
            IMPORT,
            ('"meta-llama/Llama-2-7b-hf"', "MODEL"),
            ("torch_dtype=", "dtype="),
            (
                'load_dataset("tatsu-lab/alpaca", split="train[:1000]")',
                'load_dataset("json", data_files=DATA, split="train[:16]")',
            ),
            ("max_length=512", "max_length=128"),
            ('"./lora_llama2_alpaca"', "OUTPUT, use_cpu=True"),
            ("tokenizer=tokenizer\n)", "processing_class=tokenizer\n)"),
            ('"./lora_weights"', "ADAPTER"),
        ],
    },
}


def blocks(document: Path) -> list[str]:
    found = re.findall(r"^( *)```python\n(.*?)^ *```", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    return ["\n".join(line.removeprefix(indent) for line in code.splitlines()) + "\n" for indent, code in found]


def run(document: Path, numbers: dict[int, list[tuple[str, str]]], names: dict[str, Any]) -> None:
    for number, edits in numbers.items():
        code = blocks(document)[number]
        for old, new in edits:
            assert old in code, f"block {number}: no {old!r}"
            code = code.replace(old, new)
        exec(compile(code, f"{document.name} block {number}", "exec"), names)


@pytest.fixture
def names(tmp_path: Path, stories260k: Path, test_data: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(stories260k)("Once upon a time there was a cat.")["input_ids"]
    return {
        "MODEL": str(stories260k),
        "ADAPTER": str(tmp_path / "adapter"),
        "MERGED": str(tmp_path / "merged"),
        "OUTPUT": str(tmp_path / "output"),
        "DATA": str(test_data / "data" / "llamafactory_demo" / "alpaca_en_demo.json"),
        "DATASET": [{"input_ids": ids, "labels": ids}] * 16,
    }


def document(test_data: Path, number: str) -> Path:
    found = sorted((test_data / "seeds").glob(f"{number}_*.txt"))
    if not found:
        pytest.skip(f"the test data hold no document {number}")
    return found[0]


def test_wrap_then_merge(test_data: Path, names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    first = document(test_data, "000")
    run(first, {0: EDITS["000"][0]}, names)
    printed = capsys.readouterr().out
    assert re.search(r"trainable params: [\d,]+ \|\| all params: [\d,]+ \|\| trainable%: \d+\.\d{4}\n", printed)
    names["model"].save_pretrained(names["ADAPTER"])
    run(first, {2: EDITS["000"][2]}, names)
    assert not isinstance(names["merged_model"], AdaptedModel)
    assert (Path(names["MERGED"]) / "model.safetensors").is_file()


def test_configure_wrap_train_save_load_generate(
    test_data: Path, names: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run(document(test_data, "001"), EDITS["001"], names)
    assert sorted(path.name for path in Path(names["ADAPTER"]).iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert isinstance(names["model"], smidgen.PeftModel)
    assert len(names["response"]) > len("Your prompt text")


def test_lora_on_alpaca_in_bf16(test_data: Path, names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run(document(test_data, "004"), EDITS["004"], names)
    model = names["model"]
    assert model.dtype == torch.bfloat16
    moved = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert all(p.abs().max() > 0 for p in moved) and moved
    assert "### Response:" in capsys.readouterr().out
