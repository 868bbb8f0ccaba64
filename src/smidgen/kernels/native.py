"""The native kernels: which instruction set is used, and calling them.

The library is plain C++ with a C interface, compiled once per instruction set when the package is installed
(`setup.py`) and opened with ctypes; a call costs some microseconds. Its loops run on the threads of the OpenMP runtime
that PyTorch has loaded, as many as `torch.get_num_threads()` says.

``SMIDGEN_KERNELS`` in the environment chooses: ``reference`` (plain PyTorch), or an instruction set of this machine:
``generic``, ``avx2``, ``avx512``, ``avx512_bf16`` or ``neon``. It is read when the first operation runs.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from smidgen.errors import UsageError, did_you_mean

LIBRARY = Path(__file__).with_name("libkernels.so")
INSTRUCTION_SETS = ("avx512_bf16", "avx512", "avx2", "neon", "generic")  # the fastest first
PLAIN_COST = "plain PyTorch instead: on a CPU attention takes three times as long, LoRA layers half as long again"
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float}


@dataclass(frozen=True)
class Choice:
    """What runs the operations on a CPU: a library and one of its instruction sets, or None, and why."""

    binary: ctypes.CDLL | None
    instruction_set: str
    reason: str


def chosen() -> str:
    """One line: which kernels are used on a CPU, and why."""
    choice = _choice()
    return f"kernels: {choice.instruction_set} ({choice.reason})"


def instruction_set() -> str:
    """What runs on a CPU, by the name that SMIDGEN_KERNELS takes; "reference" is plain PyTorch."""
    return _choice().instruction_set


def available() -> list[str]:
    """The values of SMIDGEN_KERNELS that work here, the fastest first."""
    library = _library()
    has = [] if library is None else [isa for isa in INSTRUCTION_SETS if library.smidgen_has(isa.encode())]
    return [*has, "reference"]


@functools.cache
def _choice() -> Choice:
    wanted, has = os.environ.get("SMIDGEN_KERNELS", ""), available()
    if wanted and wanted not in has:
        there = "" if _library() else f"; there is no library {LIBRARY}: install again with a C++ compiler"
        raise UsageError(
            f"SMIDGEN_KERNELS={wanted}: this machine has {', '.join(has)}{did_you_mean(wanted, has)}{there}"
        )
    if wanted == "reference":
        return Choice(None, wanted, f"SMIDGEN_KERNELS asks for {PLAIN_COST}")
    if wanted:
        return Choice(_library(), wanted, "as SMIDGEN_KERNELS asks")
    if has[0] == "reference":
        return Choice(None, has[0], f"no C++ compiler was found at installation; {PLAIN_COST}")
    return Choice(_library(), has[0], f"the best this machine has of {', '.join(has)}")


@functools.cache
def _library() -> ctypes.CDLL | None:
    if not LIBRARY.exists():
        return None
    library = ctypes.CDLL(str(LIBRARY))
    library.smidgen_has.argtypes = [ctypes.c_char_p]
    entry = _openmp_entry()
    if entry:
        library.smidgen_use_runtime.argtypes = [ctypes.c_void_p]
        library.smidgen_use_runtime(entry)
    return library


def _openmp_entry() -> int | None:
    """GOMP_parallel of the OpenMP runtime that PyTorch runs on; GNU's and LLVM's both have it."""
    for path in sorted(Path(str(torch.__file__)).parent.joinpath("lib").glob("libtorch_cpu.*")):
        try:
            return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def takes(*tensors: Tensor | None) -> bool:
    """Whether a native function can run: plain CPU tensors of one dtype, float32 or bfloat16.

    Under `torch.compile` plain PyTorch runs, which the compiler fuses by itself, and under `torch.func`.
    """
    return plain(*tensors) and _choice().binary is not None


def plain(*tensors: Tensor | None) -> bool:
    """What `takes` says, native code or not."""
    return eager(*tensors) and all(t is None or (t.is_cpu and t.dtype in _DTYPES) for t in tensors)


def eager(*tensors: Tensor | None) -> bool:
    """Whether an operation of our own can stand for its definition: plain tensors of one dtype of at most 32 bits.

    Nothing that compiles or transforms the definition is at work then.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    first = given[0].dtype
    narrow = first.is_floating_point and first.itemsize <= 4
    return narrow and all(t.dtype == first and type(t) in (Tensor, Parameter) for t in given)


class Kernel:
    """A native function, declared once: what it is called and what it takes.

    Args:
        name: the exported name without the instruction set before it and the dtype behind it.
        signature: a letter for each argument: p a tensor (its address is passed) or None, n a whole number, f a
            float. The number of threads, which comes last, is left out.
    """

    def __init__(self, name: str, signature: str):
        self.name = name
        self.types = [_TYPES[letter] for letter in signature] + [ctypes.c_int64]

    def __call__(self, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
        values = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
        self._function(dtype)(*values, torch.get_num_threads())

    @functools.cache  # noqa: B019 - kernels are module constants
    def _function(self, dtype: torch.dtype) -> Callable[..., None]:
        choice = _choice()
        function = getattr(choice.binary, f"smidgen_{choice.instruction_set}_{self.name}_{_DTYPES[dtype]}")
        function.argtypes, function.restype = self.types, None
        return function


def forget() -> None:
    """Choose again at the next operation, as SMIDGEN_KERNELS then says."""
    _choice.cache_clear()
    Kernel._function.cache_clear()


def rows(x: Tensor) -> Tensor:
    """`x` as a matrix of its last dimension: the same memory where its rows are evenly spaced, otherwise a copy."""
    matrix = x.reshape(-1, x.shape[-1])
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def autocast(x: Tensor) -> Tensor:
    """`x` in the type in which autocast multiplies, where it is on, as `torch.nn.functional.linear` would take it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
