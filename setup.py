"""The one part of the package that is compiled: the CPU kernels, once per instruction set, into one shared library.

Without a compiler the installation succeeds, and the package runs on plain PyTorch and says so. The library has a C
interface and is opened with ctypes: it needs neither Python nor PyTorch to be built, and fits any version of them.
"""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("src/smidgen/kernels/sources")
ONCE = "threads.cpp"
BASE = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
BASE += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # which GCC 12 says of its own intrinsics
STRIPPED = [] if "-g" in os.environ.get("CFLAGS", "").split() else ["-s"]  # debugging needs the symbols
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
X86 = {"generic": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
ISAS = {"x86_64": X86, "AMD64": X86, "aarch64": {"neon": []}, "arm64": {"neon": []}}.get(
    platform.machine(), {"generic": []}
)


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if sys.platform == "win32" and self.compiler.compiler_type == "msvc":
            raise CompileError("the kernels need GCC's or Clang's vector extensions, which MSVC lacks")
        built, objects = [], []
        sources = [source for source in ext.sources if Path(source).name != ONCE]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # each compiler is a process of its own
            compiling = {
                isa: [
                    pool.submit(self._compile, [source], isa, [*BASE, *flags, f"-DSMIDGEN_ISA={isa}"])
                    for source in sources
                ]
                for isa, flags in ISAS.items()
            }
        for isa, parts in compiling.items():
            try:
                objects += [name for part in parts for name in part.result()]
                built.append(isa)
            except CompileError:
                if isa != "avx512_bf16":  # the one that compilers in use may not know
                    raise
        known = [f"-DSMIDGEN_WITH_{isa.upper()}" for isa in built]
        objects += self._compile([str(SOURCES / ONCE)], "once", [*BASE, *known])
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, str(library), extra_postargs=["-pthread", *STRIPPED], target_lang="c++"
        )

    def _compile(self, sources: list[str], name: str, flags: list[str]) -> list[str]:
        return self.compiler.compile(sources, output_dir=str(Path(self.build_temp) / name), extra_postargs=flags)

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"  # opened by its path, so one name for all platforms


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]  # tied to the machine, not to a version of Python


setup(
    ext_modules=[
        Extension(
            "smidgen.kernels.libkernels",
            sources=sorted(map(str, SOURCES.glob("*.cpp"))),
            depends=sorted(map(str, SOURCES.glob("*.hpp"))),
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
