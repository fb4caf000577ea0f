"""The CPU loops of 64-bit ARM, where a cross compiler and an emulator are (g++-aarch64-linux-gnu
and qemu-user of Debian)."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.unsanitized
@pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"no {COMPILER}, {EMULATOR}"
)
def test_products_of_bytes_have_the_bits_of_plain_code(tmp_path):
    loops = [ROOT / f"seq2seq_fast/csrc/cpu/loops_{name}.cpp" for name in ("default", "neon_dot")]
    flags = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-static"]
    program = tmp_path / "loops"
    sources = [ROOT / "tests/arm/loops.cpp", *loops]
    subprocess.run([COMPILER, *flags, *sources, "-o", program], check=True)
    ran = subprocess.run([EMULATOR, "-cpu", "max", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout == "87116 compared, 0 wrong\n"
