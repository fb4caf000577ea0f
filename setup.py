"""Builds the extension `seq2seq_fast._C` on PyTorch's stable ABI (torch >= 2.10).

Its CUDA part goes in where PyTorch is built for CUDA and nvcc is there; SEQ2SEQ_FAST_CUDA=1 or 0
decides otherwise. An extension that has one also loads where PyTorch has no CUDA.
"""

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import Command, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

HERE = Path(__file__).parent
CSRC = Path("seq2seq_fast/csrc")
# For `make sanitize`.
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SANITIZE += ["-DS2S_SANITIZE"]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # 2.10, the oldest that is supported
# Machine code runs on those of the same major number. The PTX of the first is for what has none:
# capability 11, those after 12, and Jetsons, for which other GPUs' machine code is not promised.
ARCHITECTURES = (80, 90, 100, 120)


def find_nvcc() -> str | None:
    """nvcc; not torch's CUDA_HOME, which is None where PyTorch is built without CUDA."""
    roots = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    places = (os.path.join(root, "bin") for root in roots if root)
    return next(filter(None, (shutil.which("nvcc", path=p) for p in (*places, None))), None)


def check_release(nvcc_says: str, cuda: str | None) -> None:
    """Refuses an nvcc of a later major release than the CUDA that PyTorch is built for, if any.

    The runtime that comes with nvcc is linked: with a driver that suits PyTorch, and is too old for
    that runtime, every call of it would fail. An older runtime suits a newer driver.
    """
    release = re.search(r"release (\d+\.\d+)", nvcc_says)[1]
    major = cuda and cuda.split(".")[0]
    if major and int(release.split(".")[0]) > int(major):
        raise RuntimeError(
            f"nvcc is of CUDA {release}, this PyTorch of CUDA {cuda}: set CUDA_HOME to a CUDA"
            f" {major}, or SEQ2SEQ_FAST_CUDA=0 to build without CUDA"
        )


class BuildCuda(Command):
    """Compiles csrc/cuda/*.cu, each for all architectures, into build/cuda/HASH.

    NAME.o, and NAME.txt with what ptxas says of it; HASH is that of all that they depend on.
    """

    description = "compile the CUDA kernels; needs nvcc, no GPU and no PyTorch with CUDA"
    user_options = []

    def initialize_options(self):
        self.objects = []

    def finalize_options(self):
        self.nvcc = find_nvcc()

    def version(self) -> str:
        if self.nvcc is None:
            raise RuntimeError("no nvcc found: put it on PATH or set CUDA_HOME")
        command = [self.nvcc, "--version"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def run(self):
        version = self.version()
        targets = [f"arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
        targets.append(f"arch=compute_{ARCHITECTURES[0]},code=compute_{ARCHITECTURES[0]}")
        flags = ["-O3", "-std=c++20", STABLE_ABI, "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        flags += ["-Xptxas", "-v,-warn-spills", *(f"-gencode={target}" for target in targets)]
        flags += [f"-isystem={path}" for path in include_paths()]
        state = hashlib.sha256((version + repr((flags, torch.__version__))).encode())
        for path in sorted([*CSRC.glob("*.h"), *(CSRC / "cuda").iterdir()]):
            state.update(path.name.encode() + path.read_bytes())
        self.folder = Path("build/cuda", state.hexdigest()[:16])
        self.folder.mkdir(parents=True, exist_ok=True)

        def compile_one(source):
            out = self.folder / f"{source.stem}.o"
            if not out.exists():
                unfinished = self.folder / f"{source.stem}.{os.getpid()}.o"
                command = [self.nvcc, *flags, "-c", source, "-o", unfinished]
                ran = subprocess.run(command, capture_output=True, text=True)
                if ran.returncode != 0:
                    raise RuntimeError(f"nvcc failed:\n{ran.stdout}{ran.stderr}")
                out.with_suffix(".txt").write_text(ran.stdout + ran.stderr)
                unfinished.rename(out)
            return str(out)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self.objects = list(pool.map(compile_one, sorted((CSRC / "cuda").glob("*.cu"))))
        print(self.folder)

    def link_flags(self) -> list[str]:
        """The static runtime: the extension then fits whatever runtime PyTorch brings."""
        command = [self.nvcc, "--dryrun", "-c", "x.cu"]
        ran = subprocess.run(command, check=True, capture_output=True, text=True)
        libraries = re.search("LIBRARIES=(.*)", ran.stderr)[1].replace('"', "").split()
        return [*libraries, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


class Build(BuildExtension):
    def build_extensions(self):
        wanted = os.environ.get("SEQ2SEQ_FAST_CUDA", "")
        if wanted == "1" or (wanted != "0" and torch.version.cuda and find_nvcc()):
            cuda = self.get_finalized_command("build_cuda")
            check_release(cuda.version(), torch.version.cuda)
            cuda.run()
            for extension in self.extensions:
                extension.extra_objects += cuda.objects
                extension.extra_link_args += cuda.link_flags()
                architectures = " ".join(map(str, ARCHITECTURES))
                extension.define_macros.append(("S2S_CUDA_ARCHITECTURES", f'"{architectures}"'))
        super().build_extensions()


setup(
    ext_modules=[
        CppExtension(
            "seq2seq_fast._C",
            sorted(str(p.relative_to(HERE)) for p in (HERE / CSRC).rglob("*.cpp")),
            extra_compile_args=[
                "-O3",
                "-std=c++20",
                "-fvisibility=hidden",
                "-fno-math-errno",
                "-fno-trapping-math",
                STABLE_ABI,
                *(SANITIZE if os.environ.get("SEQ2SEQ_FAST_SANITIZE") else []),
            ],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": Build, "build_cuda": BuildCuda},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
