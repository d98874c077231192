"""Dockerfile and deploy/: what can be told of them without Docker and Kubernetes, neither of which is here."""

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import ray
import yaml

from vcf_batch import __version__
from vcf_batch.cli.run import generate

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.fixture
def job() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy/rayjob.yaml").read_text())


def test_the_job_is_a_kuberay_job_of_this_ray(job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__
    assert isinstance(yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"], str)


def test_its_gpu_workers_come_and_go(job: dict[str, Any]) -> None:
    """An autoscaled group from zero, and a command that makes it grow; a head that takes no worker."""
    cluster = job["spec"]["rayClusterSpec"]
    [group] = cluster["workerGroupSpecs"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (0, 0, 16)
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    for spec in (cluster["headGroupSpec"], group):
        [container] = spec["template"]["spec"]["containers"]
        assert container["image"].endswith(f"/vcf-batch:{'.'.join(__version__.split('.')[:2])}")
        gpus = container["resources"]["limits"].get("nvidia.com/gpu", 0)
        assert gpus == (1 if spec is group else 0)
    program, command, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (program, command) == ("vcf-batch", "generate")
    context = generate.make_context(command, arguments)
    assert (context.params["gpus_per_worker"], context.params["num_workers"]) == (1.0, group["maxReplicas"])


def instructions() -> list[list[str]]:
    lines = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [line.split() for line in lines if line]


def test_the_image_copies_what_is_there_and_pins_what_it_installs() -> None:
    for name, *words in instructions():
        if name == "COPY":
            assert all((ROOT / source).exists() for source in words[:-1]), words
        if name == "RUN" and "pip" in words:
            assert "--constraint constraints.txt" in " ".join(words)
    assert instructions()[0][:2] == ["FROM", "python:3.11-slim"]


def test_the_image_runs_the_command_as_an_ordinary_user() -> None:
    names = [name for name, *_ in instructions()]
    assert ["USER", "vcf"] in instructions() and names.index("USER") < names.index("ENTRYPOINT")
    assert instructions()[-1] == ["ENTRYPOINT", '["vcf-batch"]']
    command = re.findall(r"docker run .* vcf-batch:\S+ generate (.*)", DOCKERFILE)[0]
    assert isinstance(generate.make_context("generate", shlex.split(command)), click.Context)
