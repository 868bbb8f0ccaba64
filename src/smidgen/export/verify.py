"""The proof of a run, made again from its files alone.

Training leaves a record beside what it saved: rows with the losses of the trained model, the token ids of some
conversations, the stop tokens. Here everything is loaded anew and has to come out the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smidgen.adapters.attach import weight_changes
from smidgen.adapters.files import adapter_state_dict, read_adapter, saved_labels
from smidgen.data.conversations import CONVERSATIONS, conversation_ids
from smidgen.errors import AdapterFileError, MergeError, UsageError
from smidgen.export.merge import BOUNDS, Probe
from smidgen.foreign import read_object
from smidgen.models.fingerprint import fingerprint, is_base_of
from smidgen.models.images import image_inputs
from smidgen.models.load import free_memory, load_as, load_model, load_tokenizer
from smidgen.models.open import Place, find
from smidgen.models.peft_model import PeftModel
from smidgen.models.quantize import parameter_count
from smidgen.models.resolve import resolve_model
from smidgen.models.scores import vocabulary_size
from smidgen.models.tasks import is_scalar, labels_of, names_labels, recorded_batch, recorded_losses, task_logits
from smidgen.proofs import RECORD_NAME, Check

LOSS_TOLERANCE = 1e-5


def verify(run: Path, *, base: str | None = None, say: Callable[[str], None] = print) -> list[Check]:
    """Load what a run saved and check it against the run's record.

    An adapter: its keys fit the base, the base is the one it was trained on, every weight it acts on moves, switched
    off the model answers as the base to the bit, the losses are those of the trained model, merged it answers the same.
    A tuned model: its weights are finite and moved, the losses are those of the trained model. Both: the saved
    tokenizer writes chats as the training did, and the stop tokens are saved.

    Args:
        base: the base model, where it is no longer where the recipe says.

    Raises:
        UsageError: the folder holds no finished run.
        ModelError: the base cannot be found or read.
    """
    place, record = find(run, base), _record(run)
    with _threads(record["threads"]):
        if place.adapter:
            return list(_adapter_checks(place, record, say))
        return list(_model_checks(place, base or record["base"], record, say))


def _record(run: Path) -> dict[str, Any]:
    path = run / RECORD_NAME
    if not path.exists():
        raise UsageError(
            f"{run}: holds no {RECORD_NAME}, so there is nothing to verify; name the folder of a finished run"
        )
    record = read_object(path, UsageError)
    if "rows" not in record:
        raise UsageError(f"{run}: is a merged model; verify the run that it came from (smidgen lineage {run})")
    return record


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many threads as the training had: sums then have the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _adapter_checks(place: Place, record: dict[str, Any], say: Callable[[str], None]) -> Iterator[Check]:
    assert place.adapter is not None
    folder = place.adapter
    device = torch.device(record["device"])
    how = load_as(place.recipe, record["dtype"], device)
    labels = saved_labels(folder)
    model, _ = load_model(resolve_model(place.base), **how, labels=labels, device=device, say=say)
    yield _base_check(model, folder)
    known = [row for row in record["rows"] if max(row["ids"]) < vocabulary_size(model)]
    before = _logits(model, known, record["task"])
    try:
        adapted = PeftModel.from_pretrained(model, folder, force=True)
    except AdapterFileError as error:
        yield Check("keys", False, str(error), {})
        return
    yield _keys_check(adapted, record)
    yield _acting_check(adapted, before, known, record["task"])
    with adapted.disable_adapter():
        same = all(
            torch.equal(a, b[..., : a.shape[-1]])
            for a, b in zip(before, _logits(adapted, known, record["task"]), strict=True)
        )
    text = f"adapter off: logits of {len(known)} rows {'equal the base to the bit' if same else 'differ from the base'}"
    yield Check("off", same, text, {"rows": len(known)})
    yield _reload_check(adapted, record)
    tokenizer = load_tokenizer(folder)
    yield from _chat_checks(folder, tokenizer, record)
    yield _merge_check(adapted, tokenizer)


def _model_checks(place: Place, base: str, record: dict[str, Any], say: Callable[[str], None]) -> Iterator[Check]:
    folder, device = Path(place.base), torch.device(record["device"])
    model, tokenizer = load_model(folder, record["dtype"], device=device, say=say)
    bad = [name for name, tensor in model.named_parameters() if not tensor.isfinite().all()]
    here = fingerprint(model)
    passed = not bad and here == record["fingerprint"]
    text = f"weights: {record['tensors']} tensors, all finite, fingerprint {here[:12]} as saved"
    if not passed:
        text = f"weights: not as saved: fingerprint {here[:12]}, {len(bad)} tensors not finite: {', '.join(bad[:3])}"
    yield Check("weights", passed, text, {"tensors": record["tensors"], "fingerprint": here, "not_finite": bad})
    yield _reload_check(model, record)
    yield from _chat_checks(folder, tokenizer, record)
    yield _tuned_check(model, base, record, say)


# ---- one claim each ----


def _base_check(model: Any, folder: Path) -> Check:
    metadata, here = read_adapter(folder)[1], fingerprint(model)
    trained_on = metadata.get("base_fingerprint", "")
    passed = bool(trained_on) and is_base_of(model, metadata)
    text = f"base: fingerprint {here[:12]}, " + (
        "the one it was trained on" if passed else f"but it was trained on {trained_on[:12] or 'an unnamed one'}"
    )
    return Check("base", passed, text, {"fingerprint": here, "trained_on": trained_on})


def _keys_check(adapted: Any, record: dict[str, Any]) -> Check:
    """Loading is strict both ways; here the file must also hold as much as was trained."""
    tensors = adapter_state_dict(adapted, adapted.active_adapter)
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    passed = not bad and len(tensors) == record["tensors"]
    text = f"keys: {len(tensors)}/{record['tensors']} tensors fit the model"
    text += f", not finite: {', '.join(bad[:3])}" if bad else ", all finite"
    return Check("keys", passed, text, {"tensors": len(tensors), "trained": record["tensors"], "not_finite": bad})


def _acting_check(adapted: Any, before: list[torch.Tensor], rows: list[dict[str, Any]], task: str) -> Check:
    changes = dict(weight_changes(adapted))
    if not changes:  # of a method that is no function of the weight: what it changes is the answer
        logits = (
            tensor[..., : base.shape[-1]] for tensor, base in zip(_logits(adapted, rows, task), before, strict=True)
        )
        change = max((a - b).abs().max().item() for a, b in zip(logits, before, strict=True))
        return Check("acts", change > 0, f"adapter changes logits by up to {change:.1e}", {"logits": change})
    still = [path for path, ratio in changes.items() if not ratio]
    median = float(np.median(list(changes.values()))) if changes else 0.0
    text = f"adapter acts on {len(changes) - len(still)}/{len(changes)} weights, ||dW||/||W|| median {median:.1e}"
    text += f"; no change: {', '.join(still[:3])}" if still else ""
    return Check("acts", not still, text, {"weights": len(changes), "still": still, "ratio": median})


def _reload_check(model: Any, record: dict[str, Any]) -> Check:
    expected = [row["loss"] for row in record["rows"]]
    found = recorded_losses(model, record["rows"], record["task"])
    worst = max(abs(a - b) for a, b in zip(expected, found, strict=True))
    same = "equal to the bit" if expected == found else f"largest difference {worst:.1e}"
    text = f"reload: {'score' if is_scalar(model) else 'loss'} of {len(found)} rows {same}"
    return Check("reload", worst <= LOSS_TOLERANCE, text, {"trained": expected, "fresh": found, "difference": worst})


def _chat_checks(folder: Path, tokenizer: Any, record: dict[str, Any]) -> Iterator[Check]:
    expected, found = record["conversations"], conversation_ids(tokenizer)
    wrong = [(name, a, b) for (name, _, _), a, b in zip(CONVERSATIONS, expected, found, strict=True) if a != b]
    text = f"template: {len(found) - len(wrong)}/{len(found)} conversations identical"
    if wrong:
        text += f"; {wrong[0][0]}: {_first_difference(*wrong[0][1:])}"
    yield Check("template", not wrong, text, {"conversations": len(found), "different": [name for name, *_ in wrong]})
    if not record["stop_tokens"]:
        return
    declared = read_object(folder / "generation_config.json", UsageError).get("eos_token_id")
    stops = declared if isinstance(declared, list) else [declared]
    missing = [token for token in record["stop_tokens"] if token not in stops]
    names = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in record["stop_tokens"])
    text = f"stop tokens: {names or 'none'}" + (f"; not saved: {missing}" if missing else "")
    yield Check("stop", not missing, text, {"expected": record["stop_tokens"], "saved": stops})


def _first_difference(one: list[int] | None, other: list[int] | None) -> str:
    if one is None or other is None:
        return f"refused {'in training' if one is None else 'now'} only"
    at = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"differs at token {at}: train={one[at : at + 1]} saved={other[at : at + 1]}"


def _merge_check(adapted: Any, tokenizer: Any) -> Check:
    """Merged in place; in float32 where there is memory for it, since rounding would hide small mistakes."""
    if 4 * parameter_count(adapted) < free_memory(adapted.device):
        adapted.float()
    dtype = str(adapted.dtype).removeprefix("torch.")
    probe = Probe(adapted, tokenizer)
    try:
        adapted.merge_adapter()
    except MergeError as error:
        return Check("merge", True, f"merge: not possible with this method: {error}", {})
    # In 16 bits the answers of both are rounded, not the merged weights alone.
    bound = BOUNDS[adapted.dtype] * (1 if adapted.dtype == torch.float32 else 2)
    parity = probe.compare(adapted, bound)
    return Check("merge", parity.passed, f"merge in {dtype}: {parity}", asdict(parity))


def _tuned_check(model: Any, base: str, record: dict[str, Any], say: Callable[[str], None]) -> Check:
    """Exactly the tensors that were trained differ from the base's."""
    labels = labels_of(model) if names_labels(model.config) else ()
    how: Any = {"task": record["task"], "labels": labels, "device": torch.device("cpu"), "say": say}
    original, _ = load_model(resolve_model(base), record["dtype"], **how)
    others = dict(original.named_parameters())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p.cpu(), others[name])}
    trained = set(record["trained"])
    text = f"model moved: {len(moved & trained)}/{len(trained)} trained tensors differ from the base"
    still, foreign = sorted(trained - moved), sorted(moved - trained)
    text += f"; still: {', '.join(still[:3])}" if still else ""
    text += f"; changed without training: {', '.join(foreign[:3])}" if foreign else ""
    return Check("moved", moved == trained, text, {"moved": len(moved), "still": still, "foreign": foreign})


@torch.no_grad()
def _logits(model: Any, rows: list[dict[str, Any]], task: str) -> list[torch.Tensor]:
    """The logits of recorded rows, with their images."""
    if task != "causal_lm":
        return [task_logits(model, recorded_batch(row).to(model.device), task).cpu() for row in rows]
    inputs = [image_inputs(model, row["images"]) if row.get("images") else {} for row in rows]
    ids = [torch.tensor([row["ids"]], device=model.device) for row in rows]
    return [model(tokens, **others).logits.cpu() for tokens, others in zip(ids, inputs, strict=True)]
