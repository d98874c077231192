"""The device type of a worker: everything that a run's bytes depend on besides its fingerprint.

What is recorded here may differ without a difference in bytes, but not the other way round. Kernels of CPUs are chosen
by the instruction set, by the model of the processor and its caches, and by environment variables of the libraries.
"""

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import features

import vcf_batch

CONTENT_PACKAGES = ("torch", "diffusers", "transformers", "tokenizers", "numpy", "pyarrow", "Pillow")
"""Packages that compute, encode or write what is in an output."""

CODECS = ("zlib", "zlib_ng", "libjpeg_turbo", "webp", "avif", "littlecms2")
"""Libraries that Pillow was built with: each decodes references, converts their colours or encodes images."""

ENVIRONMENT = ("ONEDNN_", "DNNL_", "MKL_", "FBGEMM_", "TORCH_MKLDNN_", "OMP_THREAD_LIMIT", "OMP_DYNAMIC")
"""Beginnings of environment variables by which libraries choose their kernels on a CPU."""

GPU_ENVIRONMENT = ("CUBLAS", "CUDNN_", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32", "TORCH_BLAS_PREFER", "TORCH_CUDNN_")
"""The same for GPUs."""

_VERBOSE = "VERBOSE"
"""Part of the names of variables that only make a library talk."""

_FLAGS = ("sse4", "avx", "fma", "f16c", "amx", "asimd", "sve", "sme", "bf16", "i8mm", "fphp")
"""Beginnings of the names of instruction sets that kernels of networks use."""

_CPU_FIELDS = {
    "vendor_id": "vendor",
    "cpu family": "family",
    "model": "model",
    "stepping": "stepping",
    "CPU implementer": "vendor",
    "CPU part": "model",
    "CPU variant": "stepping",
}
"""Lines of /proc/cpuinfo that name the model of a processor, on x86 and on Arm."""


def describe(kind: str, dtype: torch.dtype, threads: int, attention: str, compiled: bool) -> dict[str, Any]:
    """The ``device`` of a receipt.

    Args:
        kind: ``cuda`` or ``cpu``.
        dtype: number type of the networks.
        threads: number of CPU threads of one computation.
        attention: the kernel of attention, see :func:`vcf_batch.vcf.attention.choose_kernel`; ``cpu`` on a CPU.
        compiled: whether networks are compiled, so that the compiler counts too.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    cpu = {"architecture": platform.machine(), "capability": capability}
    versions = {name: importlib.metadata.version(name) for name in CONTENT_PACKAGES} | {
        "vcf_batch": vcf_batch.__version__
    }
    versions |= {name: version for name in CODECS if (version := features.version(name))}
    if compiled:
        versions["compiler"] = _compiler(kind)
    described = {
        "type": f"{platform.machine()} {capability}",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "attention": attention,
        # Noise is drawn on the CPU, whose instruction set decides its last bits on GPUs too.
        "cpu": cpu,
        "environment": variables(os.environ, kind),
        "versions": versions,
    }
    if kind == "cpu":
        return described | {"cpu": cpu | processor(_read("/proc/cpuinfo")) | {"caches": _caches()}}
    properties = torch.cuda.get_device_properties()
    return described | {
        "type": torch.cuda.get_device_name(),
        "gpu": {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
        },
        "versions": versions
        | {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cublas": _cublas(),
            "driver": _driver(),
        },
    }


def is_mixed(gpus: str = "/proc/driver/nvidia/gpus") -> bool:
    """Whether this node has GPUs of several models; False where the driver does not tell. Never run on a GPU so far.

    Args:
        gpus: folder in which NVIDIA's driver describes each GPU of the node, whichever this process may use.
    """
    described = [_read(str(path)) for path in Path(gpus).glob("*/information")]
    return len({line for text in described for line in text.splitlines() if line.startswith("Model:")}) > 1


def variables(environment: Mapping[str, str], kind: str) -> dict[str, str]:
    """The environment variables that decide on kernels, by name.

    ``ATEN_CPU_CAPABILITY`` is not among them, because the capability itself is recorded.
    """
    beginnings = ENVIRONMENT + (GPU_ENVIRONMENT if kind == "cuda" else ())
    return {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(beginnings) and _VERBOSE not in name
    }


def processor(cpuinfo: str) -> dict[str, str]:
    """Vendor, model and instruction sets of the first processor in a ``/proc/cpuinfo``; empty where it is empty."""
    found: dict[str, str] = {}
    for line in cpuinfo.partition("\n\n")[0].splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name in _CPU_FIELDS:
            found[_CPU_FIELDS[name]] = value
        elif name in ("flags", "Features"):
            found["instructions"] = " ".join(sorted({flag for flag in value.split() if flag.startswith(_FLAGS)}))
    return found


def _caches() -> list[str]:
    """Level, kind and size of the first processor's caches, by which kernels cut their sums into blocks."""
    folders = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    return [" ".join(_read(str(folder / name)).strip() for name in ("level", "type", "size")) for folder in folders]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:  # other systems have no such file
        return ""


def _compiler(kind: str) -> str:
    """Version of what compiles networks on this node: Triton for GPUs, else the C++ compiler."""
    try:
        if kind == "cuda":
            return f"triton {importlib.metadata.version('triton')}"
        from torch._inductor.cpp_builder import get_cpp_compiler  # takes a second, which other runs save

        told = subprocess.run([get_cpp_compiler(), "--version"], capture_output=True, text=True, timeout=60, check=True)
        return told.stdout.partition("\n")[0]
    except Exception:  # compiling will fail, too, with torch's own reason
        return "unknown"


def _cublas() -> str:
    """Version of the cuBLAS that is loaded; ``unknown`` where it does not tell. Never run on a GPU so far."""
    major = (torch.version.cuda or "").partition(".")[0]
    with contextlib.suppress(OSError, AttributeError):
        library, numbers = ctypes.CDLL(f"libcublas.so.{major}"), []
        for part in range(3):
            number = ctypes.c_int()
            if library.cublasGetProperty(part, ctypes.byref(number)):
                return "unknown"
            numbers.append(str(number.value))
        return ".".join(numbers)
    return "unknown"


def _driver() -> str:
    """Version of the GPU's driver, from NVML; ``unknown`` where it does not tell. Never run on a GPU so far."""
    with contextlib.suppress(OSError, AttributeError):
        nvml, text = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.create_string_buffer(96)
        if not nvml.nvmlInit_v2():
            failed = nvml.nvmlSystemGetDriverVersion(text, len(text))
            nvml.nvmlShutdown()
            return "unknown" if failed else text.value.decode()
    return "unknown"
