"""Builds the extension (csrc/) into the package; everything static is in pyproject.toml.

VJEPA_FAST_EXT says which kernels: `auto` (default) builds what the machine can, C++ if there is PyTorch and a compiler,
CUDA too if there is nvcc, and never fails; `cpu` and `cuda` fail if they cannot be had; `0` builds nothing.

PyTorch is not among the build requirements, where it would be downloaded a second time, perhaps in another version: the
one of the environment is used, also from within pip's isolated build. The library uses the stable ABI of PyTorch 2.10
(STABLE_TORCH_LIBRARY) and loads in any later one. torch.utils.cpp_extension would not build CUDA kernels for a PyTorch
without CUDA, so the compilers are called here.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

HERE = Path(__file__).resolve().parent
MODE = os.environ.get("VJEPA_FAST_EXT") or "auto"
SOURCES = ["csrc/mask_sampler.cpp", "csrc/clip_pixels.cpp", "csrc/rope3d.cpp"]
INFO_SOURCE = "csrc/build_info.cpp"
CUDA_SOURCES = ["csrc/mask_sampler.cu", "csrc/clip_pixels.cu"]
ARCHITECTURES = ("80", "90", "100")
"""Machine code for A100, H100 and B200; the last also as PTX, from which later GPUs are served."""
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]


def find_torch() -> ModuleType | None:
    """PyTorch of the environment that is installed into."""
    try:
        import torch
    except ImportError:
        # An isolated build runs the environment's interpreter and only hides its packages. They come last, so that the
        # build requirements stay what they are.
        for name in ("purelib", "platlib"):
            site.addsitedir(sysconfig.get_path(name))
        try:
            import torch
        except ImportError:
            return None
    return torch


def find_nvcc() -> Path | None:
    """On the path, in CUDA_HOME, or where the toolkit installs itself."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    found = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))
    return Path(found).resolve() if found else None


def run(*command: str | Path) -> None:
    words = [str(word) for word in command]
    print(shlex.join(words), flush=True)
    try:
        subprocess.run(words, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(f"{words[0]} failed: {error}") from error


def notice(text: str) -> None:
    print(f"vjepa-fast: {text}", file=sys.stderr, flush=True)


class BuildExtension(build_ext):
    """One shared library without a Python ABI: it is loaded by PyTorch, not imported."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        try:
            self.build(ext, find_nvcc() if MODE in ("auto", "cuda") else None)
        except CompileError as error:
            if MODE == "auto":
                notice(
                    f"built without the C++ extension: {error}. Masks will be drawn by NumPy, clips cropped and "
                    "resized by PyTorch"
                )
            raise

    def build(self, ext: Extension, nvcc: Path | None) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        compiler = shlex.split(os.environ.get("CXX", "c++"))
        include = [word for path in include_paths() for word in ("-isystem", path)]
        objects = [self.compile(compiler, source, include) for source in SOURCES]
        link: list[str] = []
        architectures: list[str] = []
        if nvcc is not None:
            try:
                architectures = supported_architectures(nvcc)
                compiled = [self.compile_cuda(nvcc, source, architectures, include) for source in CUDA_SOURCES]
                # Static, so that the library does not ask for the CUDA release that it was built with.
                link = [f"-L{find_cudart(nvcc)}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
                objects += compiled
            except CompileError as error:
                if MODE == "cuda":
                    raise
                notice(f"built without CUDA kernels: {error}")
                architectures = []
        elif MODE == "cuda":
            raise CompileError("VJEPA_FAST_EXT=cuda needs nvcc; put it on the PATH or set CUDA_HOME")
        about = {"VERSION": version(), "TORCH": TORCH.__version__, "CUDA_ARCHITECTURES": ";".join(architectures)}
        objects.append(
            self.compile(compiler, INFO_SOURCE, [f'-DVJEPA_FAST_{name}="{value}"' for name, value in about.items()])
        )
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # libtorch must stay among what is needed even though no symbol comes from it directly: on a PyTorch with CUDA
        # it brings in libtorch_cuda, where the weak symbols of the CUDA kernels are.
        libraries = ["-Wl,--push-state,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,--pop-state"]
        run(
            *compiler,
            "-shared",
            *objects,
            "-o",
            target,
            *(f"-L{path}" for path in library_paths()),
            *libraries,
            *link,
            "-Wl,--exclude-libs,ALL",
        )

    def object_of(self, source: str) -> Path:
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{Path(source).name}.o"

    def compile(self, compiler: list[str], source: str, more: list[str]) -> Path:
        target = self.object_of(source)
        flags = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", *DEFINES]
        if sysconfig.get_platform().endswith("x86_64"):
            # In every processor since 2011: counting bits is a good part of a mask, packing bytes of a clip.
            flags += ["-mpopcnt", "-msse4.2"]
        run(*compiler, "-c", HERE / source, "-o", target, *flags, *more)
        return target

    def compile_cuda(self, nvcc: Path, source: str, architectures: list[str], include: list[str]) -> Path:
        target = self.object_of(source)
        codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
        codes.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
        run(
            nvcc,
            "-c",
            HERE / source,
            "-o",
            target,
            "-std=c++20",
            "-O3",
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden",
            "-Xptxas",
            "-v",
            "-DUSE_CUDA=1",
            *DEFINES,
            *codes,
            *include,
        )
        return target


def output_of(*command: str | Path) -> str:
    """What a command prints, errors included."""
    try:
        done = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(f"{command[0]} failed: {error}") from error
    return done.stdout + done.stderr


def supported_architectures(nvcc: Path) -> list[str]:
    """Those of ARCHITECTURES that this nvcc knows."""
    known = output_of(nvcc, "--list-gpu-arch").split()
    found = [name for name in ARCHITECTURES if f"compute_{name}" in known]
    if not found:
        raise CompileError(f"{nvcc} knows none of the architectures {', '.join(ARCHITECTURES)}")
    return found


def find_cudart(nvcc: Path) -> Path:
    """Folder of libcudart_static.a."""
    # The nvcc of the path may be a script that runs another one, which knows where it is.
    top = re.search(r"^#\$ TOP=(.+)$", output_of(nvcc, "--dryrun", "-c", "none.cu"), re.MULTILINE)
    home = Path(top.group(1).strip()).resolve() if top else nvcc.parent.parent
    for pattern in ("lib64/libcudart_static.a", "lib/libcudart_static.a", "targets/*/lib/libcudart_static.a"):
        for found in sorted(home.glob(pattern)):
            return found.parent
    raise CompileError(f"no libcudart_static.a under {home}; install the CUDA runtime's development files")


def version() -> str:
    text = (HERE / "vjepa_fast" / "__init__.py").read_text()
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    assert found is not None
    return found.group(1)


class Wheel(bdist_wheel):
    """Any Python may use the library."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


if MODE not in ("auto", "cpu", "cuda", "0"):
    raise SystemExit(f"VJEPA_FAST_EXT is {MODE!r}; expected auto, cpu, cuda or 0")
TORCH = None if MODE == "0" or sys.platform != "linux" else find_torch()
if TORCH is None:
    if MODE in ("cpu", "cuda"):
        raise SystemExit(
            f"VJEPA_FAST_EXT={MODE} needs Linux and an installed PyTorch; if a build tool hides the "
            "environment's packages, use pip install --no-build-isolation"
        )
    if MODE == "auto":
        notice(
            "no PyTorch to build for, so the C++ extension is left out: masks will be drawn by NumPy, clips cropped "
            "and resized by PyTorch; install PyTorch first, then vjepa-fast again"
        )
    setup()
else:
    setup(
        ext_modules=[Extension("vjepa_fast._C", [*SOURCES, INFO_SOURCE, *CUDA_SOURCES], optional=MODE == "auto")],
        cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel},
    )
