"""Names of files and folders: what a file system or an object store takes, a run takes."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from support import runs
from vcf_batch import storage
from vcf_batch.cli import main
from vcf_batch.config.run_config import RunConfig
from vcf_batch.output import shards

ODD = "josé 猫 #1?[x] 🎨%20*"
REFERENCES = ("réf 猫.png", "a%20b.png", "c#d.png", "e?f=1.png", "g[0].png", "🎨.png", "h*.png", "i&j;k.png")


def write(place: str, model: Path) -> None:
    """A model, references and their manifest below a place, all under odd names."""
    files = {f"modèle/{path.relative_to(model)}": path.read_bytes() for path in model.rglob("*") if path.is_file()}
    files |= {f"in ü/{name}": runs.png(number) for number, name in enumerate(REFERENCES)}
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"prompt": ["a"] * len(REFERENCES), "reference": [*REFERENCES]}), buffer)
    files["in ü/mänifest #1.parquet"] = buffer.getvalue().to_pybytes()
    for name, data in files.items():
        storage.publish_bytes(f"{place}/{name}", data)


def check(output: str) -> None:
    """Every row has its reference and was compared with it."""
    rows = [sample["json"] for name in ("00000", "00001") for sample in shards.read_samples(f"{output}/{name}.tar")]
    assert [row["reference"] for row in rows] == [*REFERENCES]
    assert all(row["clip_reference"] is not None for row in rows)


@pytest.mark.usefixtures("restored_torch")
def test_a_run_takes_every_name_of_an_object_store(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output, manifest, references and model; here without Ray, `make test-all` has the whole command."""
    monkeypatch.setenv("VCF_BATCH_CACHE", str(tmp_path / ODD))
    place = storage.join(s3, ODD)
    write(place, runs.save_model(tmp_path / "model"))
    manifest, output = f"{place}/in ü/mänifest #1.parquet", f"{place}/oüt 🎨 %20"
    settings: dict[str, Any] = {"gpus_per_worker": 0, "shard_size": 4, "batch_size": 2, **runs.SIZE}
    runs.run_here(RunConfig(manifest=manifest, output=output, model=f"{place}/modèle", **settings))
    verified = CliRunner().invoke(main, ["verify", output])
    assert verified.exit_code == 0, verified.output
    check(output)


@pytest.mark.parametrize("where", ["disk", pytest.param("s3", marks=pytest.mark.slow)])
def test_a_run_takes_every_name(where: str, tmp_path: Path, s3: str) -> None:
    """Output, manifest, references, model, working directory and TMPDIR, with an ASCII locale."""
    local = tmp_path / ODD
    place = str(local) if where == "disk" else storage.join(s3, ODD)
    write(place, runs.save_model(local / "modèle [1] 猫"))
    (local / "cwd ß").mkdir()
    output = f"{place}/oüt 🎨 %20"
    # Names of sockets are short, those of pytest's folders are not.
    temporary = tempfile.mkdtemp(prefix="té 猫%")
    try:
        command = ["generate", f"{place}/in ü/mänifest #1.parquet", output, "--model", f"{place}/modèle"]
        settings = [f"--{name}={value}" for name, value in runs.SIZE.items()]
        variables = {
            "LC_ALL": "C",
            "TMPDIR": temporary,
            "RAY_AUTH_MODE": "disabled",
            "VCF_BATCH_CACHE": f"{local}/cache",
        }
        settings += ["--shard-size=4", "--batch-size=2", "--address=local"]
        for words in ([*command, *settings], ["verify", output]):
            subprocess.run(
                [sys.executable, "-m", "vcf_batch", *words],
                check=True,
                cwd=local / "cwd ß",
                env=os.environ | variables,
            )
    finally:
        shutil.rmtree(temporary)
    check(output)
