"""A and B both random: the start is not the base model (``init_lora_weights: false``, for tests)."""

from torch import Tensor

from smidgen.adapters.init import Start, default


def initialise(start: Start, r: int, scaling: float) -> tuple[Tensor, Tensor, bool]:
    """A and B uniform as ``nn.Linear`` starts."""
    a, _, _ = default.initialise(start, r, scaling)
    b, _, _ = default.initialise(start._replace(shape=(1, r)), start.shape[0], scaling)
    return a, b, False
