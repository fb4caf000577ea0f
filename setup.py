"""Builds the CPU extension `seq2seq_fast._C` on PyTorch's stable ABI (torch >= 2.10)."""

import os
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

HERE = Path(__file__).parent
# For `make sanitize`.
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SANITIZE += ["-DS2S_SANITIZE"]
STABLE_ABI = "0x020a000000000000"  # torch 2.10, the oldest release that is supported

setup(
    ext_modules=[
        CppExtension(
            "seq2seq_fast._C",
            sorted(str(p.relative_to(HERE)) for p in (HERE / "seq2seq_fast/csrc").rglob("*.cpp")),
            extra_compile_args=[
                "-O3",
                "-std=c++20",
                "-fvisibility=hidden",
                "-fno-math-errno",
                "-fno-trapping-math",
                f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
                *(SANITIZE if os.environ.get("SEQ2SEQ_FAST_SANITIZE") else []),
            ],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
