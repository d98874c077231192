"""cluster.yaml against Ray's own schema and rules."""

from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster))


def test_it_is_a_cpu_head_with_autoscaled_spot_gpu_workers(cluster: dict[str, Any]) -> None:
    nodes = cluster["available_node_types"]
    assert nodes[cluster["head_node_type"]]["resources"] == {"CPU": 0}
    gpu = nodes["gpu"]
    assert (gpu["min_workers"], gpu["max_workers"], cluster["max_workers"]) == (0, 16, 16)
    assert gpu["resources"]["GPU"] == 1
    assert gpu["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


def test_the_job_that_its_comments_submit_makes_the_autoscaler_start_gpus() -> None:
    comments = (ROOT / "cluster.yaml").read_text().partition("cluster_name:")[0]
    assert "--gpus-per-worker 1" in comments.partition("ray job submit")[2].partition("ray down")[0]


def test_versions_are_pinned(cluster: dict[str, Any]) -> None:
    setup = "\n".join(cluster["setup_commands"])
    assert f"ray[default]=={ray.__version__}" in setup
    assert "--constraint" in setup
    assert '"$HOME/vcf-batch[plots,s3]"' in setup, "object storage, and evaluations with a plot"
    assert f"ray=={ray.__version__}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_every_node_asks_for_the_token(cluster: dict[str, Any]) -> None:
    """Head and workers start with token authentication; the token is copied to where Ray looks for it."""
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        [start] = [each for each in commands if " ray start " in each]
        assert start.startswith("RAY_AUTH_MODE=token ")
    home = f"/home/{cluster['auth']['ssh_user']}"
    assert cluster["file_mounts"][f"{home}/.ray/auth_token"] == "~/.ray/auth_token"
    assert 'chmod 600 "$HOME/.ray/auth_token"' in cluster["setup_commands"]


def test_the_dashboard_listens_on_loopback(cluster: dict[str, Any]) -> None:
    [start] = [each for each in cluster["head_start_ray_commands"] if "--head" in each]
    assert "--dashboard-host=127.0.0.1" in start.split()


def test_metadata_needs_a_session_and_disks_are_encrypted(cluster: dict[str, Any]) -> None:
    """Every node has IMDSv2 alone, and no volume without encryption."""
    for name, node in cluster["available_node_types"].items():
        options = node["node_config"]["MetadataOptions"]
        assert (options["HttpTokens"], options["HttpPutResponseHopLimit"]) == ("required", 1), name
        assert all(each["Ebs"]["Encrypted"] is True for each in node["node_config"]["BlockDeviceMappings"]), name
