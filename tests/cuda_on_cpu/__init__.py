"""The CUDA kernels compiled by the host compiler and run on the CPU. See cuda_on_cpu.h.

Their ops are those of the library, under torch.ops.seq2seq_fast_cuda_on_cpu.
"""

import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from seq2seq_fast.library import SCHEMAS
from seq2seq_fast.ops.kernels import OPS

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CSRC = ROOT / "seq2seq_fast/csrc"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = [
    *("-std=c++20", "-O1", "-fno-math-errno", "-fPIC", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-missing-field-initializers"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    *(f"-I{path}" for path in (HERE, CSRC, CSRC / "cuda")),
    *(f"-isystem{path}" for path in include_paths()),
]
# What finds races, see races.h: the compiler's calls at every access.
WATCHES_RACES = os.environ.get("CUDA_ON_CPU_RACES") == "1"
RACES = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-g1"]


def content_hash(*extra: str) -> str:
    """Of everything that what is built from csrc/cuda depends on."""
    sum_ = hashlib.sha256(repr((torch.__version__, extra)).encode())
    for path in sorted([*CSRC.glob("*.h"), *(CSRC / "cuda").iterdir(), *HERE.glob("*.*")]):
        sum_.update(path.name.encode() + path.read_bytes())
    return sum_.hexdigest()[:16]


_failed: list[str] = []  # what the compiler said; every test would ask it anew


def build() -> Path:
    assert not _failed, _failed[0]
    flags = RACES if WATCHES_RACES else []
    folder = ROOT / "build/cuda_on_cpu" / content_hash(COMPILER, *FLAGS, *flags)
    library = folder / "cuda_on_cpu.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        out = folder / (source.stem + ".o")
        watched = [] if source.name == "races.cpp" else flags
        command = [COMPILER, *FLAGS, *watched, "-x", "c++", "-c", source, "-o", out]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            _failed.append(ran.stderr)
        assert ran.returncode == 0, ran.stderr
        return out

    with ThreadPoolExecutor(2) as pool:
        sources = [*(CSRC / "cuda").glob("*.cu"), *HERE.glob("*.cpp")]
        objects = list(pool.map(compile_one, sources))
    unfinished = folder / f"{os.getpid()}.so"
    torch_libraries = (*(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu")
    command = [COMPILER, "-shared", *objects, *torch_libraries, "-o", unfinished]
    subprocess.run(command, check=True)
    unfinished.rename(library)
    return library


def load():
    """The namespace of the ops."""
    global _definitions
    _definitions = torch.library.Library("seq2seq_fast_cuda_on_cpu", "FRAGMENT")
    for name, schema in SCHEMAS.items():
        _definitions.define(name + schema)
    torch.ops.load_library(str(build()))
    return torch.ops.seq2seq_fast_cuda_on_cpu


def become_native(ops, monkeypatch):
    """The library's native ops are those of a namespace, until the test ends."""
    for name, backend in OPS:
        if backend == "native":
            monkeypatch.setitem(OPS, (name, backend), getattr(ops, name))
