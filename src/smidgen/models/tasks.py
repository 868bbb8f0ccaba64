"""What a model is made to do: which class loads it, its new head, and its answers to rows with labels.

Letters: B rows, T tokens, L labels of a row, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from smidgen.adapters.attach import adapters_of
from smidgen.adapters.base import in_adapter
from smidgen.adapters.config import TaskType
from smidgen.adapters.trained import TrainedCopy
from smidgen.data.packing import IGNORED
from smidgen.data.rows import TokenRow
from smidgen.data.task_rows import TaskBatch, TaskRow, task_batch
from smidgen.errors import AdapterFileError, ModelError
from smidgen.foreign import contained, read_object
from smidgen.losses.lm import token_cross_entropy
from smidgen.models.scores import row_losses, takes

AUTO_CLASSES: dict[TaskType, Any] = {
    TaskType.CAUSAL_LM: transformers.AutoModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: transformers.AutoModelForSeq2SeqLM,
    TaskType.SEQ_CLS: transformers.AutoModelForSequenceClassification,
    TaskType.TOKEN_CLS: transformers.AutoModelForTokenClassification,
    TaskType.QUESTION_ANS: transformers.AutoModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: transformers.AutoModel,
}
# How the class is called that a configuration names as its own.
_ENDINGS = {
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
}
_NEW = "new_heads"  # the attribute of a model that keeps their paths


def task_of_config(config: Mapping[str, Any]) -> TaskType:
    """What the model of a folder does, by the class that its configuration names; language modelling otherwise."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    if config.get("is_encoder_decoder") is True and name.endswith("ForConditionalGeneration"):
        return TaskType.SEQ_2_SEQ_LM
    return next((task for ending, task in _ENDINGS.items() if name.endswith(ending)), TaskType.CAUSAL_LM)


def task_of(model: Any) -> TaskType:
    """What a loaded model does."""
    for task, auto in AUTO_CLASSES.items():
        kind = type(model.config)
        if kind in auto._model_mapping and isinstance(model, auto._model_mapping[kind]):
            return task
    return TaskType.CAUSAL_LM  # one that takes images too


def is_scalar(model: Any) -> bool:
    """Whether a model gives a row one value, not the probabilities of classes."""
    return task_of(model) == TaskType.SEQ_CLS and model.config.num_labels == 1


# ---- heads ----


def new_heads(model: nn.Module) -> list[str]:
    """The paths of the modules that the model's files did not hold: a task adds them, and they are to be trained."""
    return vars(model).get(_NEW, [])


def remember_new_heads(model: Any, missing: Iterable[str]) -> list[str]:
    """Note which modules were made anew; answer the names of other weights that the files lack.

    A head is a child of the model that the files lack as a whole; poolers, which language models do without, may be
    within the body.

    Args:
        missing: the names of the parameters that the files do not hold, or not in the shape that is needed.
    """
    lacking, heads, others = set(missing), [], []
    body = getattr(model, "base_model_prefix", "")
    for name in sorted(lacking):
        child, path = name.partition(".")[0], name.rpartition(".")[0]
        whole = child != body and all(
            f"{child}.{own}" in lacking for own, _ in model.get_submodule(child).named_parameters()
        )
        if whole or "pooler" in path:
            heads.append(child if whole else path)
        else:
            others.append(name)
    vars(model)[_NEW] = list(dict.fromkeys(heads))
    return others


def check_heads(model: Any, adapter: str, heads: Sequence[str], place: str) -> None:
    """Raise `AdapterFileError` where neither the base nor the adapter of a name holds a head: it would be random."""
    copied = replaced_modules(model, adapter)
    lost = [head for head in heads if not any(head == path or head.startswith(f"{path}.") for path in copied)]
    if lost:
        raise AdapterFileError(
            f"{place}: holds no weights of '{', '.join(lost)}', and neither does the base: answers would be random. "
            "Train it again with this module in modules_to_save, or take a base that has it"
        )


def replaced_modules(model: Any, adapter: str) -> list[str]:
    """The paths of the modules of which an adapter holds every parameter: what the base has there does not matter."""
    return [
        path
        for path, there in adapters_of(model, adapter)
        if isinstance(there, TrainedCopy) and len([*there.parameters()]) == _parameter_count(model.get_submodule(path))
    ]


def _parameter_count(module: nn.Module) -> int:
    return sum(not in_adapter(name) for name, _ in module.named_parameters())


def labels_of(model: Any) -> list[str]:
    """The names of the classes of a model in their order."""
    return [str(model.config.id2label[index]) for index in range(model.config.num_labels)]


def names_labels(config: Any) -> bool:
    """Whether the names of a configuration's classes were chosen by someone."""
    named = getattr(config, "id2label", None) or {}
    return any(str(name) != f"LABEL_{index}" for index, name in named.items())


def classes_of(folder: Path) -> list[str]:
    """The names of the classes that the model of a folder knows; none where it names none."""
    named = read_object(contained(folder, "config.json", ModelError), ModelError).get("id2label")
    names = list(named.values()) if isinstance(named, dict) else []
    return [] if names == [f"LABEL_{index}" for index in range(len(names))] else [str(name) for name in names]


def label_fields(labels: Sequence[str]) -> dict[str, Any]:
    """The fields of a model's configuration that name its classes; none where there are none."""
    if not labels:
        return {}
    return {"id2label": dict(enumerate(labels)), "label2id": {name: index for index, name in enumerate(labels)}}


# ---- answers ----


def task_logits(model: Any, batch: TaskBatch, task: str) -> Tensor:
    """The logits of the classes at each label's place, (B, L, C) as the model computes them.

    The classes of question answering are the tokens: those of padding have minus infinity, so that a row's answer does
    not depend on its neighbours.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids}
    if batch.attention_mask is not None:
        inputs["attention_mask"] = batch.attention_mask
    if batch.second is not None and takes(model, "token_type_ids"):
        inputs["token_type_ids"] = batch.second
    if task == "seq_2_seq_lm":
        start = model.prepare_decoder_input_ids_from_labels(batch.labels)
        return model(**inputs, decoder_input_ids=start, use_cache=False).logits
    if takes(model, "use_cache"):
        inputs["use_cache"] = False
    answer = model(**inputs)
    if task == "question_ans":
        ends = torch.stack([answer.start_logits, answer.end_logits], dim=1)
        if batch.attention_mask is None:
            return ends
        return ends.masked_fill(batch.attention_mask[:, None] == 0, -torch.inf)
    return answer.logits[:, None] if task == "seq_cls" else answer.logits


def task_losses(model: Any, batch: TaskBatch, task: str) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every label of a batch.

    Returns:
        (N,) float32 losses in nats, and (N,) int64 indices of the rows they belong to.
    """
    there = batch.labels != IGNORED
    values = token_cross_entropy(task_logits(model, batch, task)[there], batch.labels[there])
    rows = torch.tensor(batch.rows, device=batch.labels.device)
    return values, rows[:, None].expand_as(batch.labels)[there]


@torch.no_grad()
def predict(model: Any, row: TaskRow, task: str, pad_id: int) -> np.ndarray:
    """The likeliest classes of a row in the places of its labels, (L,); for rewriting the text, (S,) new tokens."""
    batch = task_batch([row], [0], pad_id).to(model.device)
    if task != "seq_2_seq_lm":
        return task_logits(model, batch, task)[0].argmax(-1).cpu().numpy()
    how = {"max_new_tokens": max(16, 2 * len(row.labels)), "do_sample": False, "num_beams": 1}
    start = model.config.decoder_start_token_id
    found = model.generate(input_ids=batch.input_ids, decoder_start_token_id=start, **how)
    return found[0, 1:].cpu().numpy()


def recorded(row: TokenRow | TaskRow) -> dict[str, list[Any]]:
    """A row as JSON holds it."""
    if isinstance(row, TokenRow):
        return {"ids": row.input_ids.tolist(), "supervised": row.supervised.tolist(), "images": list(row.images)}
    return {"ids": row.input_ids.tolist(), "second": row.second.tolist(), "labels": row.labels.tolist()}


def recorded_losses(model: Any, rows: Sequence[Mapping[str, Any]], task: str) -> list[float]:
    """The mean loss of each recorded row, or the one value that the model gives it, computed one row at a time."""
    if task == "causal_lm":
        images = [row.get("images", ()) for row in rows]
        return row_losses(model, [(row["ids"], row["supervised"]) for row in rows], images)
    with torch.no_grad():
        batches = [recorded_batch(row).to(model.device) for row in rows]
        if is_scalar(model):
            return [task_logits(model, batch, task).item() for batch in batches]
        return [task_losses(model, batch, task)[0].mean().item() for batch in batches]


def recorded_batch(row: Mapping[str, Any]) -> TaskBatch:
    """The batch of one recorded row; one of tokens alone has no labels."""
    given = {"second": [0] * len(row["ids"]), "labels": [IGNORED], **row}
    arrays = [np.array(given[name], dtype=np.int64) for name in ("ids", "second", "labels")]
    return task_batch([TaskRow(*arrays, where="")], [0], 0)
