"""What this machine decides where no cluster does."""

import ctypes
import runpy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vcf_batch.worker import in_process


def test_gpus_are_those_that_torch_sees() -> None:
    """It is found out without torch, whose import takes seconds."""
    assert in_process.has_gpu() == torch.cuda.is_available()


@pytest.mark.parametrize(
    ("built", "driver", "initialised", "devices", "expected"),
    [
        ("12.8", 12040, 0, 2, True),
        ("12.8", 13000, 0, 1, True),
        ("13.0", 12080, 0, 1, False),
        ("12.8", 12080, 0, 0, False),
        ("12.8", 12080, 100, 1, False),
        (None, 12080, 0, 1, False),
    ],
    ids=["older minor", "newer", "too old", "no device", "none visible", "built for CPUs"],
)
def test_a_gpu_needs_a_build_and_a_driver_that_fit(
    monkeypatch: pytest.MonkeyPatch, built: str | None, driver: int, initialised: int, devices: int, expected: bool
) -> None:
    """As CUDA has it: a driver serves the runtimes of its own major version and of those before."""

    def tell(value: int) -> Any:
        def call(answer: Any) -> int:
            answer._obj.value = value
            return 0

        return call

    library = SimpleNamespace(
        cuDriverGetVersion=tell(driver), cuInit=lambda flags: initialised, cuDeviceGetCount=tell(devices)
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(runpy, "run_path", lambda path: {"cuda": built, "hip": None})
    assert in_process.has_gpu() is expected


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(runpy, "run_path", lambda path: {"cuda": "12.8", "hip": None})
    assert in_process.has_gpu() is False
