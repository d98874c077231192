"""The figures of a run as metrics, scraped as Prometheus does."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from support import runs
from vcf_batch.output.receipts import Receipt
from vcf_batch.pool import prometheus
from vcf_batch.pool.prometheus import PrometheusExporter, ascii_label
from vcf_batch.records import Shard

ROOT = Path(__file__).parents[2]

DRIVER = """
    import re, sys, time, urllib.request
    import ray
    from vcf_batch.pool.prometheus import PrometheusExporter
    from vcf_batch.output.receipts import Receipt
    from vcf_batch.records import Shard

    port = int(sys.argv[1])
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _metrics_export_port=port)
    timings = {"total": 10.0, "sample": 8.0, "wait_for_references": 0.5, "ended": "2026-01-01", "worker": "a:1"}
    receipt = Receipt(
        Shard(0, 0, 4, "00000"), "f", 1, {"success": 3, "rejected": 0, "failed": 1}, {}, {"type": "gpu"}, timings,
        histograms={"clip_score": {"0.30": 2, "0.35": 1}},
    )
    exporter = PrometheusExporter("s3://user:secret@bucket/out", 20)
    exporter.committed(receipt)
    exporter.now(6, 2)
    for _ in range(120):
        try:
            text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        except OSError:
            text = ""
        found = [line for line in text.splitlines() if line.startswith("ray_vcf_batch_")]
        if any("score_bucket" in line for line in found) and any("workers" in line for line in found):
            break
        time.sleep(0.5)
    for line in found:
        name, tags, value = re.fullmatch(r"(\\w+){(.*)} (\\S+)", line).groups()
        ours = sorted(tag for tag in tags.split(",") if tag.split("=")[0] in
                      {"output", "status", "phase", "queue", "device", "score", "le"})
        print(name, ",".join(ours), float(value))
"""


@pytest.mark.slow
def test_metrics_are_scraped_from_ray() -> None:
    """With the names that docs/monitoring.md tells."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    words = [sys.executable, "-c", textwrap.dedent(DRIVER), str(runs.free_ports(1)[0])]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = set(done.stdout.splitlines())
    output = 'output="s3://bucket/out"'
    assert lines >= {
        f'ray_vcf_batch_samples_total {output},status="success" 3.0',
        f'ray_vcf_batch_samples_total {output},status="failed" 1.0',
        f'ray_vcf_batch_phase_seconds_total {output},phase="sample" 8.0',
        f'ray_vcf_batch_wait_seconds_total {output},queue="references" 0.5',
        f'ray_vcf_batch_worker_seconds_total device="gpu",{output} 10.0',
        f'ray_vcf_batch_device_busy device="gpu",{output} 0.8',
        f"ray_vcf_batch_rows {output} 20.0",
        f"ray_vcf_batch_rows_done {output} 6.0",
        f"ray_vcf_batch_workers {output} 2.0",
    }, done.stdout
    buckets = {line.rpartition(" ")[2] for line in lines if "score_bucket" in line and 'le="0.3"' in line}
    assert buckets == {"2.0"}, done.stdout


@pytest.mark.parametrize("output", ["/home/josé/out", "s3://bucket/猫/out", "/data/\udcff/🎨 #1?[x]%20"])
def test_no_name_of_an_output_is_beyond_a_label(output: str) -> None:
    """A home folder with an accent, or a name that is no UTF-8, does not end a run."""
    assert ascii_label(output).isascii()
    assert ascii_label("s3://bucket/a b_1%20?[x]#") == "s3://bucket/a b_1%20?[x]#"
    PrometheusExporter(output, 4).now(1, 1)


def test_a_failure_of_metrics_is_told_once_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no agent")

    monkeypatch.setattr(prometheus.metrics, "Counter", refuse)
    exporter = PrometheusExporter("out", 4)
    exporter.committed(Receipt(Shard(0, 0, 4, "00000"), "f", 1, {"success": 4}, {}, {"type": "cpu"}, {}))
    exporter.now(4, 1)
    assert [record.message for record in caplog.records] == [
        "the run exports no metrics any more: RuntimeError: no agent"
    ]
