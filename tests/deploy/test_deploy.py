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
def manifests() -> dict[str, dict[str, Any]]:
    """What deploy/rayjob.yaml describes, by kind."""
    return {each["kind"]: each for each in yaml.safe_load_all((ROOT / "deploy/rayjob.yaml").read_text())}


@pytest.fixture
def job(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return manifests["RayJob"]


def templates(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods of a job: of the submitter, of the head, of each group of workers."""
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [job["spec"]["submitterPodTemplate"], *(group["template"] for group in groups)]


def containers(job: dict[str, Any]) -> list[dict[str, Any]]:
    """All containers, with the one that KubeRay adds to the head for the autoscaler."""
    options = job["spec"]["rayClusterSpec"]["autoscalerOptions"]
    return [options, *(each for template in templates(job) for each in template["spec"]["containers"])]


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


def test_the_cluster_asks_for_a_token(job: dict[str, Any]) -> None:
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_every_container_has_the_least_rights(job: dict[str, Any]) -> None:
    """An ordinary user without capabilities or new privileges, on a read-only root, under the runtime's seccomp."""
    assert len(containers(job)) == 4
    for container in containers(job):
        rights = container["securityContext"]
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["readOnlyRootFilesystem"] is True
        assert rights["runAsNonRoot"] is True
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert rights["seccompProfile"] == {"type": "RuntimeDefault"}
    for template in templates(job):
        assert template["spec"]["securityContext"]["runAsUser"] == 1000


def test_what_a_run_writes_on_has_a_volume_in_every_container(job: dict[str, Any]) -> None:
    """/tmp and the home are empty folders of the pod; test_read_only_root.py shows that a run needs no other."""
    for container in containers(job):
        assert {each["mountPath"] for each in container["volumeMounts"]} == {"/tmp", "/home/vcf"}
    for template in templates(job):
        assert all("emptyDir" in each for each in template["spec"]["volumes"])
        names = {each["name"] for each in template["spec"]["volumes"]}
        assert all(mount["name"] in names for each in template["spec"]["containers"] for mount in each["volumeMounts"])
    assert ["WORKDIR", "/home/vcf"] in instructions()


def test_pods_but_the_heads_have_no_access_to_kubernetes(job: dict[str, Any]) -> None:
    submitter, head, *workers = templates(job)
    assert all(each["spec"]["automountServiceAccountToken"] is False for each in (submitter, *workers))
    assert "automountServiceAccountToken" not in head["spec"], "its autoscaler asks Kubernetes for pods"


def test_the_network_lets_only_the_pods_of_the_job_and_the_operator_in(manifests: dict[str, dict[str, Any]]) -> None:
    """The policy selects all pods of the job; the operator reaches the port of job submission alone."""
    policy = manifests["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    for template in templates(manifests["RayJob"]):
        assert template["metadata"]["labels"].items() >= policy["podSelector"]["matchLabels"].items()
    among, operator = policy["ingress"]
    assert among == {"from": [{"podSelector": policy["podSelector"]}]}
    [peer] = operator["from"]
    assert {"namespaceSelector", "podSelector"} == peer.keys()
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]


def instructions() -> list[list[str]]:
    lines = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [line.split() for line in lines if line]


def test_the_images_base_is_named_by_digest() -> None:
    bases = [words[0] for name, *words in instructions() if name == "FROM"]
    assert [base.partition("@")[0] for base in bases] == ["python:3.11-slim-bookworm"]
    assert all(re.fullmatch(r"[^@]+@sha256:[0-9a-f]{64}", base) for base in bases)


def test_the_image_copies_what_is_there_and_installs_by_hash() -> None:
    """Packages come from the lock with their hashes; the project itself brings none along."""
    defaults = dict(words[0].split("=") for name, *words in instructions() if name == "ARG")
    assert defaults == {"LOCK": "requirements.lock"}
    installs = []
    for name, *words in instructions():
        if name == "COPY":
            sources = [source.replace("${LOCK}", defaults["LOCK"]) for source in words[:-1]]
            assert all((ROOT / source).exists() for source in sources), words
        if name == "RUN" and "pip" in words:
            installs.append({*words})
    packages, project = installs
    assert {"--require-hashes", "--requirement", "requirements.lock"} <= packages
    assert {"--no-index", "--no-deps", "--no-build-isolation", "."} <= project


def test_the_image_runs_the_command_as_an_ordinary_user() -> None:
    names = [name for name, *_ in instructions()]
    assert ["USER", "1000"] in instructions() and names.index("USER") < names.index("ENTRYPOINT")
    assert instructions()[-1] == ["ENTRYPOINT", '["vcf-batch"]']
    command = re.findall(r"docker run .* vcf-batch:\S+ generate (.*)", DOCKERFILE)[0]
    assert isinstance(generate.make_context("generate", shlex.split(command)), click.Context)
