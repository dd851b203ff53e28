"""native.c, compiled once for this CPU by the machine's own C compiler, and kept.

    source + compiler + flags + CPU -> sha256 -> ~/.cache/lorax/native-SHA.so

There is nothing to install: where no compiler is found, or what it makes cannot be loaded,
`library` gives None, and generation takes plain PyTorch. CC names another compiler, as for make.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from lorax.backend import chosen

log = logging.getLogger("lorax")

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-fPIC", "-std=gnu11", "-w")
OPENMP = (("-fopenmp",), ())  # what is tried; torch has the library with it, so none is linked
COMPILERS = ("cc", "gcc", "clang")
LONGEST_SECONDS = 60
KINDS = {torch.float32: 0, torch.bfloat16: 1}  # native.c's FLOAT32 and BFLOAT16


class Product(ctypes.Structure):
    """What native.c calls Product: a Linear's weight, bias and low-rank path."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "n_in", "n_out", "block")),
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "code", "bias")),
        *((name, ctypes.c_int64) for name in ("rank", "path_kind")),
        *((name, ctypes.c_void_p) for name in ("A", "B")),
        ("scaling", ctypes.c_float),
    )


class Layer(ctypes.Structure):
    """What native.c calls Layer: one layer's keys and values, (slots, kv_heads, places, width)."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "heads", "kv_heads", "width", "places")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
    )


def uses_native(tensor: torch.Tensor) -> bool:
    """Whether lorax/inference/native.c may compute with this tensor: on a CPU, unless forbidden."""
    return chosen() in ("auto", "compiled") and tensor.device.type == "cpu"


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where there is no way to have them."""
    compiler = _compiler()
    if compiler is None:
        return None
    for openmp in OPENMP:
        try:
            return _declared(_loaded(compiler, (*FLAGS, *openmp)))
        except (OSError, subprocess.SubprocessError) as error:
            log.info("%s %s: %s", compiler, " ".join(openmp), error)
    return None


def _compiler() -> str | None:
    names = [os.environ["CC"]] if os.environ.get("CC") else COMPILERS
    return next((found for name in names if (found := shutil.which(name))), None)


def _loaded(compiler: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The library, made if it is not there."""
    source = SOURCE.read_bytes()
    about = "\0".join((os.path.realpath(compiler), *flags, _cpu())).encode()
    name = f"native-{hashlib.sha256(source + about).hexdigest()[:32]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorax"
    if (folder / name).is_file():
        return ctypes.CDLL(str(folder / name))
    with tempfile.TemporaryDirectory(prefix="lorax-native-") as temporary:
        made, linked = Path(temporary) / "native.o", Path(temporary) / name
        _run(compiler, *flags, "-c", str(SOURCE), "-o", str(made))
        _run(compiler, "-shared", str(made), "-lm", "-o", str(linked))
        with suppress(OSError):  # a directory that cannot be written to: each process makes its own
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            beside = folder / f"{name}.{os.getpid()}"
            shutil.copyfile(linked, beside)
            os.replace(beside, folder / name)  # whole or not at all, whoever else makes it now
        return ctypes.CDLL(str(linked))  # it is mapped: the file may go


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=LONGEST_SECONDS)


def _cpu() -> str:
    """What -march=native depends on: a home directory may be shared by different machines."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return f"{platform.machine()} {platform.processor()}"


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    """The functions with the types of their arguments; none gives anything back."""
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    declared = {
        "products": (pointer, pointer, integer, pointer, integer, integer, integer, integer),
        "gate_in_place": (pointer, pointer, integer, integer),
        "decode": (pointer, pointer, integer, integer),
        "rms_norm": (pointer, pointer, pointer, integer, integer, integer, real, real, integer),
        "attend": (*(pointer,) * 9, integer, integer, integer, real, real, integer),
    }
    for name, types in declared.items():
        getattr(found, name).argtypes = types
        getattr(found, name).restype = None
    return found


@cache
def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware; elsewhere float32 is faster."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
