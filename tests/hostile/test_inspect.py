"""`smidgen inspect` shows what a folder from elsewhere would do, and does none of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from smidgen.cli.inspect import inspect
from smidgen.errors import ModelError
from tests.hostile.cases import marker, model_folder, pickled, read_model
from tests.hostile.folders import edit_json


def test_code_templates_and_control_characters_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_folder(tmp_path)
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text(f"open({str(marker(tmp_path))!r}, 'w')")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}\x1b[2J{% endfor %}\n{% if 'bank' in messages[-1].content %}x{% endif %}"
    )
    inspect(folder)
    told = capsys.readouterr().out
    assert 'names code of its own ({"AutoModelForCausalLM": "evil.Model"}); it is ignored, never run' in told
    assert "template of chat_template.jinja" in told
    assert "look at line 2: it looks for 'bank' in what is written" in told
    assert "\x1b" not in told
    read_model(folder)  # works, without the code
    assert not marker(tmp_path).exists()


def test_a_pickle_is_told_unread(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickled(tmp_path))
    with pytest.raises(ModelError, match="refused: a pickle file"):
        inspect(folder)
    assert not marker(tmp_path).exists()
