"""What differs in bytes differs in the recorded device type."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vcf_batch.worker import device_type

ROOT = Path(__file__).parents[2]

QUICK: tuple[dict[str, str], ...] = (
    {},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"MKL_CBWR": "COMPATIBLE"},
)
"""Environments of the embedded model's runs, each of which libraries may read as another processor."""

MORE: tuple[dict[str, str], ...] = (
    {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"ONEDNN_DEFAULT_FPMATH_MODE": "BF16"},
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "avx512"},
    {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
)

RUN = """
import hashlib, json, sys, tempfile
from vcf_batch.config.run_config import RunConfig
from vcf_batch.output import shards
from vcf_batch.setup import absolute_paths, defaults, manifest_check, run_models
from vcf_batch.setup.shard_task import ShardTask
from vcf_batch.worker import worker

output = tempfile.mkdtemp()
sizes = {"limit": 2, "batch_size": 2, "shard_size": 2, "steps": 2}
config = RunConfig(manifest="manifests/demo.parquet", output=output, gpus_per_worker=0, lpips="none", **sizes)
config = absolute_paths.absolute(config)
job = defaults.settle(config, manifest_check.open_checked(config, None), run_models.resolve(config))
receipt, staged = worker.load(job).run(ShardTask(job.shards[0]), "attempt")
images = [sample["png"] for sample in shards.read_samples(output + "/" + staged["tar"])]
print(json.dumps([hashlib.sha256(b"".join(images)).hexdigest(), receipt.device]))
"""


@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="an x86 processor with AVX2 is needed")
@pytest.mark.parametrize("choices", [QUICK, pytest.param(QUICK + MORE, marks=pytest.mark.slow)])
def test_where_images_differ_the_recorded_device_type_differs(choices: tuple[dict[str, str], ...]) -> None:
    """The output is a function of fingerprint and device type, whatever libraries take this processor for."""
    found = []
    for settings in choices:
        if settings.get("ATEN_CPU_CAPABILITY") == "avx512" and not torch.cpu._is_avx512_supported():
            continue
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("ATEN_", "ONEDNN_", "MKL_"))}
        environment = clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | settings
        done = subprocess.run(
            [sys.executable, "-c", RUN], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, (settings, done.stderr)
        found.append((settings, *json.loads(done.stdout.splitlines()[-1])))
    for (one, image, device), (other, other_image, other_device) in itertools.combinations(found, 2):
        assert image == other_image or device != other_device, (one, other)
    assert len({image for _, image, _ in found}) > 1  # otherwise this test shows nothing


def test_variables_that_choose_kernels_are_recorded() -> None:
    """A variable that only makes a library talk, and one whose effect is recorded itself, are not."""
    environment = {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_CBWR": "AVX2",
        "ONEDNN_VERBOSE": "1",
        "ATEN_CPU_CAPABILITY": "avx2",
        "NVIDIA_TF32_OVERRIDE": "0",
        "HOME": "/home",
    }
    assert device_type.variables(environment, "cpu") == {"MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert device_type.variables(environment, "cuda").keys() == {
        "MKL_CBWR",
        "ONEDNN_MAX_CPU_ISA",
        "NVIDIA_TF32_OVERRIDE",
    }


@pytest.mark.parametrize(
    ("cpuinfo", "told"),
    [
        (
            "processor : 0\nvendor_id : GenuineIntel\ncpu family : 6\nmodel : 106\nmodel name : Xeon\nstepping : 6\n"
            "flags : fpu sse4_1 fma avx2 avx512f amx_bf16\n\nprocessor : 1\nmodel : 9\n",
            {
                "vendor": "GenuineIntel",
                "family": "6",
                "model": "106",
                "stepping": "6",
                "instructions": "amx_bf16 avx2 avx512f fma sse4_1",
            },
        ),
        (
            "processor\t: 0\nFeatures\t: fp asimd sve bf16 crc32\nCPU implementer\t: 0x41\nCPU variant\t: 0x1\n"
            "CPU part\t: 0xd40\n",
            {"vendor": "0x41", "model": "0xd40", "stepping": "0x1", "instructions": "asimd bf16 sve"},
        ),
        ("", {}),
    ],
)
def test_the_model_of_a_processor_is_read(cpuinfo: str, told: dict[str, str]) -> None:
    """Kernels depend on vendor and model, which the name of an instruction set leaves out."""
    assert device_type.processor(cpuinfo) == told


def test_a_cpu_is_described_with_all_that_its_bytes_depend_on() -> None:
    """The description is plain JSON, and the same each time."""
    told = device_type.describe("cpu", torch.float32, 2, "cpu", False)
    assert json.loads(json.dumps(told)) == told == device_type.describe("cpu", torch.float32, 2, "cpu", False)
    assert (told["threads"], told["attention"]) == (2, "cpu")
    assert told["cpu"]["capability"] == torch.backends.cpu.get_cpu_capability()
    assert {"torch", "pyarrow", "Pillow", "zlib", "littlecms2", "vcf_batch"} <= told["versions"].keys()
    compiled = device_type.describe("cpu", torch.float32, 2, "cpu", True)
    assert compiled["versions"].keys() - told["versions"].keys() == {"compiler"}


def test_a_node_with_gpus_of_several_models_is_known_by_the_drivers_list(tmp_path: Path) -> None:
    assert not device_type.is_mixed(str(tmp_path / "none"))
    for number, model in enumerate(["NVIDIA RTX A6000", "NVIDIA RTX A6000", "NVIDIA L40S"]):
        folder = tmp_path / f"0000:{number:02}:00.0"
        folder.mkdir()
        (folder / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t {number}\n")
        assert device_type.is_mixed(str(tmp_path)) == (number == 2)
