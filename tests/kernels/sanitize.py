"""Builds the native code with the address and undefined-behaviour sanitizers and runs the kernels' tests on it.

    python tests/kernels/sanitize.py

Needs Linux and GCC. Every instruction set of this machine is built as `setup.py` says, and tried on the odd shapes of
the tests. First an error is made on purpose: if that were not found, finding nothing would say nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
TESTS = ["-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "tests/kernels"]
MISTAKE = """
import torch
from smidgen import kernels
from smidgen.kernels.native import Kernel
x = torch.ones(4, 8)
Kernel("dropout", "pnpnnnnnn")(x.dtype, x, 8, x, 8, 5, 8, 0, 0, 0)  # five rows of four
"""


def build(folder: Path) -> None:
    """The package with a library that checks itself, into `folder`."""
    compile_flags = f"{SANITIZE} -fno-omit-frame-pointer -g"  # read under either name, as setuptools is new or old
    flags = {"CFLAGS": compile_flags, "CXXFLAGS": compile_flags, "LDFLAGS": SANITIZE}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(folder), "--build-lib", str(folder)]
    subprocess.run(command, cwd=ROOT, env=os.environ | flags, check=True)
    if not (folder / "smidgen" / "kernels" / "libkernels.so").exists():
        sys.exit("the native code was not built: see the compiler's messages above")


def runtime() -> str:
    """The libraries that must be in the process before all others."""
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):  # the second so that exceptions of PyTorch can be thrown
        answer = subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True)
        found.append(answer.stdout.strip())
        if not Path(found[-1]).is_absolute():
            sys.exit(f"the compiler has no {name}: install GCC's sanitizers")
    return ":".join(found)


def main() -> int:
    """The exit status: 0 if nothing was found."""
    with tempfile.TemporaryDirectory() as place:
        build(Path(place))
        checked = {"LD_PRELOAD": runtime(), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": place}
        environment = {name: value for name, value in os.environ.items() if name != "SMIDGEN_KERNELS"} | checked
        mistake = subprocess.run([sys.executable, "-c", MISTAKE], env=environment, capture_output=True, text=True)
        if "heap-buffer-overflow" not in mistake.stderr:
            sys.exit(f"the sanitizers did not find an error made on purpose:\n{mistake.stderr}")
        return subprocess.run([sys.executable, *TESTS], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
