"""What is told when memory ends."""

from __future__ import annotations

import pytest

from smidgen.errors import TrainingStopped
from smidgen.training.memory import telling_out_of_memory


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a matmul primitive"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (MemoryError(), True),
    ],
    ids=str,
)
def test_an_end_of_memory_is_told_whatever_raises_it(error, ends):
    expected, words = (TrainingStopped, "out of memory in step 3.\nfewer rows") if ends else (RuntimeError, str(error))
    with pytest.raises(expected, match=words), telling_out_of_memory(lambda: "in step 3", lambda: "fewer rows"):
        raise error
