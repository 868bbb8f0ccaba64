"""A and B both random: the start is not the base model (``init_lora_weights: false``, for tests)."""

from torch import Tensor

from smidgen.adapters.init import default


def initialise(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor, bool]:
    """A and B uniform as ``nn.Linear`` starts."""
    a, _, _ = default.initialise(weight, r, scaling)
    b, _, _ = default.initialise(weight.new_empty(1, r), weight.shape[0], scaling)
    return a, b, False
