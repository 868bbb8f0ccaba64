"""Data: files to checked token rows to batches. Nothing here loads torch until a batch is made."""

from smidgen.data.check import DataReport
from smidgen.data.packing import Batch, epoch_plan, micro_batches
from smidgen.data.preference_data import Preferences, prepare_preferences
from smidgen.data.preference_rows import LabelledRows, PairRow, PairRows
from smidgen.data.prepare import Prepared, prepare_data
from smidgen.data.rows import TokenRow, TokenRows
from smidgen.data.tokenise import encode_prompt, encode_text

__all__ = [
    "Batch",
    "DataReport",
    "LabelledRows",
    "PairRow",
    "PairRows",
    "Preferences",
    "Prepared",
    "TokenRow",
    "TokenRows",
    "encode_prompt",
    "encode_text",
    "epoch_plan",
    "micro_batches",
    "prepare_data",
    "prepare_preferences",
]
