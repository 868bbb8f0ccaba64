"""The native code under the address and undefined-behaviour sanitizers, on odd shapes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import smidgen.kernels
from smidgen.kernels import native

SOURCES = Path(smidgen.kernels.__file__).with_name("sources")
FLAGS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512_bf16": "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16".split(),
}
SCRIPT = """
import pathlib, sys, torch
from smidgen.kernels import native
native.LIBRARY = pathlib.Path(sys.argv[1])
from smidgen import kernels
print(kernels.chosen())
torch.set_num_threads(2)
for dtype in (torch.float32, torch.bfloat16):
    for rows, width in ((0, 3), (1, 1), (3, 7), (5, 16), (9, 33), (70, 100)):
        x = torch.randn(rows, 2, width).to(dtype).requires_grad_()
        w = torch.randn(width).to(dtype).requires_grad_()
        a, b = torch.randn(5, width, requires_grad=True), torch.randn(11, 5, requires_grad=True)
        base, head = torch.randn(11, width).to(dtype), torch.randn(13, width).to(dtype)
        total, normed = kernels.add_rms_norm(x, x, w, 1e-6)
        angles, wide = torch.randn(rows, (width + 1) // 2), torch.cat((x, x), -1)
        answers = [
            kernels.dropout(x, 0.5, 1), kernels.rms_norm(x, w, 1e-6), total, normed, kernels.layer_norm(x, w, w, 1e-6),
            kernels.swiglu(x, x), kernels.geglu(x, x), kernels.geglu(x, x, tanh=True),
            kernels.rope(wide, angles, angles), kernels.rope(wide, angles, angles, True),
            kernels.lora_linear(x, base, None, [kernels.LowRank(a, b, 2.0, 0.5, 1)]),
            kernels.linear_cross_entropy(x[:, 0], head, torch.arange(rows) % 13, softcap=3.0),
            kernels.linear_cross_entropy(x[:, 0], head.clone().requires_grad_(), torch.arange(rows) % 13),
        ]
        sum(y.float().sum() for y in answers).backward()
    for lengths in ([], [1], [0, 3, 0, 65], [64, 17], [130], [1100]):
        for width, window, softcap in ((1, None, None), (24, 5, None), (80, None, 2.0), (256, 64, None)):
            T = sum(lengths)
            q, k, v = (torch.randn(T, h, width).to(dtype).requires_grad_() for h in (4, 2, 2))
            out, _ = kernels.attention(q, k, v, torch.tensor([0, *lengths]).cumsum(0), None, window, softcap)
            out.float().sum().backward()
print("done")
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ on Linux")
@pytest.mark.parametrize("isa", [isa for isa in FLAGS if isa in native.available()])
def test_nothing_is_found(isa, tmp_path):
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1", "-fPIC", "-std=c++17"]
    objects = []
    for source in sorted(SOURCES.glob("*.cpp")):
        flags = [] if source.name == "threads.cpp" else FLAGS[isa]
        macros = [f"-DSMIDGEN_ISA={isa}", "-DSMIDGEN_WITH_AVX512_BF16", "-Wno-psabi"]
        objects.append(str(tmp_path / f"{source.stem}.o"))
        subprocess.run(["g++", *sanitize, *flags, *macros, "-c", str(source), "-o", objects[-1]], check=True)
    library = tmp_path / "libkernels.so"
    subprocess.run(["g++", *sanitize, "-shared", *objects, "-o", str(library), "-pthread"], check=True)
    needed = []
    for name in ("libasan.so", "libstdc++.so.6"):  # the second so that exceptions of PyTorch can be thrown
        found = subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True)
        needed.append(found.stdout.strip())
    environment = os.environ | {
        "LD_PRELOAD": ":".join(needed),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own allocations at its end
        "SMIDGEN_KERNELS": isa,
        "PYTHONPATH": str(SOURCES.parents[2]),
    }
    command = [sys.executable, "-c", SCRIPT, str(library)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0 and run.stdout.strip().endswith("done"), run.stdout + run.stderr[:4000]
