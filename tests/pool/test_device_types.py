"""Two nodes of a real cluster whose libraries take their processors for different ones."""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from support import runs
from vcf_batch import pool
from vcf_batch.config.run_config import RunConfig
from vcf_batch.report import status

ROWS, SHARD_SIZE = 24, 2


@pytest.fixture(scope="module")
def nodes() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="vb", dir="/tmp", ignore_cleanup_errors=True) as folder:
        head = {"num_cpus": 1, "include_dashboard": False, "temp_dir": folder}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            cluster.add_node(num_cpus=1, env_vars={"ONEDNN_MAX_CPU_ISA": "AVX2"})
            ray.init(address=cluster.address, log_to_driver=False)
            yield
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    model = runs.save_model(tmp_path_factory.mktemp("model"))
    manifest = runs.write_manifest(tmp_path_factory.mktemp("manifest"), ROWS)
    settings = {"shard_size": SHARD_SIZE, "batch_size": 2, "num_workers": 2, **runs.SIZE}
    return RunConfig(manifest=str(manifest), output="out", model=str(model), **settings)


def test_nodes_that_compute_differently_are_told_apart(
    nodes: None, config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Receipts name two types, the driver says so once, ``status`` counts them."""
    mixed = str(tmp_path / "mixed")
    with caplog.at_level(logging.WARNING):
        pool.run(config.replace(output=mixed))
    told = [record.getMessage() for record in caplog.records if "several device types" in record.getMessage()]
    assert len(told) == 1 and "environment.ONEDNN_MAX_CPU_ISA" in told[0]
    document = status.read(mixed).to_dict()
    assert document["device_types"] == len(document["devices"]) == 2
    assert "2 types" in str(status.read(mixed))


# `make test` has this on a simulated cluster: see
# driver/test_loop.py::test_a_run_of_one_device_type_leaves_other_nodes_out.
@pytest.mark.slow
def test_nodes_that_compute_differently_are_left_out_on_request(
    nodes: None, config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run may keep to one device type."""
    alike = str(tmp_path / "alike")
    with caplog.at_level(logging.WARNING):
        pool.run(config.replace(output=alike, one_device_type=True))
    assert status.read(alike).to_dict()["device_types"] == 1
    told = [text for text in map(logging.LogRecord.getMessage, caplog.records) if "is not used" in text]
    assert len(told) == 1 and "environment.ONEDNN_MAX_CPU_ISA" in told[0]
