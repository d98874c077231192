"""The device of a worker, on whose type a run's bytes depend besides its fingerprint."""

import contextlib
import functools
import os
import socket
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import NodeError
from vcf_batch.models.cache import cache_folder
from vcf_batch.vcf.attention import Kernel, cudnn_attention, pin_kernel
from vcf_batch.worker.device_type import describe


@dataclass(frozen=True)
class Device:
    """Kind, number type and threads of a worker's computations."""

    kind: str
    """``cuda`` or ``cpu``."""
    dtype: torch.dtype
    threads: int
    """Number of CPU threads of one computation. Sums depend on it."""
    attention: str
    """Kernel of attention: see :func:`vcf_batch.vcf.attention.choose_kernel`; ``cpu`` on a CPU."""
    compiled: bool
    """Whether networks are compiled."""
    stream: torch.cuda.Stream | None = None
    """Queue of the work that is done beside the sampling; None on a CPU."""

    @classmethod
    def set_up(cls, config: RunConfig) -> "Device":
        """Set this process up to compute the same bytes every time.

        Kernels are chosen by rule, never by timing, and only deterministic ones are allowed. Compiled kernels are kept
        for other workers and later runs: in ``TORCHINDUCTOR_CACHE_DIR`` if it is set, else in ``compiled`` beside the
        models of the node's cache.

        Args:
            config: the run, with ``dtype`` and ``gpus_per_worker`` resolved.

        Raises:
            NodeError: this node has no GPU that computes as the run asks, or cannot have the kernel of attention that
                other nodes have.
        """
        kind = "cuda" if config.gpus_per_worker else "cpu"
        dtype = getattr(torch, config.dtype)
        if kind == "cuda" and not torch.cuda.is_available():
            raise NodeError(
                f"--gpus-per-worker is {config.gpus_per_worker}, but torch {torch.__version__} sees no GPU on "
                f"{socket.gethostname()}; install a CUDA build of torch there, or use --gpus-per-worker 0"
            )
        if kind == "cuda" and dtype is torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            name = f"{torch.cuda.get_device_name()} on {socket.gethostname()}"
            raise NodeError(f"{name} has no bfloat16; use --dtype float16 or float32")
        # For processes that Ray did not start with the run's environment.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if config.compile:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(cache_folder(), "compiled"))
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
        # Filling fresh memory costs time, and nothing here reads memory before it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        attention = pin_kernel(dtype) if kind == "cuda" else "cpu"
        stream = torch.cuda.Stream(priority=-1) if kind == "cuda" else None  # what is short goes first
        device = cls(kind, dtype, config.cpus_per_worker, attention, config.compile, stream)
        device.use_threads()
        return device

    def use_threads(self) -> None:
        """Set the number of CPU threads for the calling thread: OpenMP keeps it per thread."""
        torch.set_num_threads(self.threads)

    def beside(self) -> AbstractContextManager[Any]:
        """Context in which the calling thread's work on a GPU runs beside the sampling and waits for itself alone.

        By default all threads share one queue, and whoever reads a result back waits for all that is queued.
        """
        return torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext()

    @property
    def attention_kernel(self) -> Kernel | None:
        """The kernel that the UNet's attention calls by name; None where torch's own choice is the fixed one."""
        return cudnn_attention if self.attention == "cudnn" else None

    @functools.cached_property
    def description(self) -> Mapping[str, Any]:
        """The ``device`` of a receipt: what the bytes depend on besides the fingerprint."""
        return describe(self.kind, self.dtype, self.threads, self.attention, self.compiled)
