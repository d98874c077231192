"""Names of files and folders: what a file system or an object store takes, a run takes."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support import runs
from vcf_batch import storage
from vcf_batch.output import shards

ODD = "josé 猫 #1?[x] 🎨%20*"
REFERENCES = ("réf 猫.png", "a%20b.png", "c#d.png", "e?f=1.png", "g[0].png", "🎨.png", "h*.png", "i&j;k.png")


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_a_run_takes_every_name(where: str, tmp_path: Path, s3: str) -> None:
    """Output, manifest, references, model, working directory and TMPDIR, with an ASCII locale."""
    local = tmp_path / ODD
    place = str(local) if where == "disk" else storage.join(s3, ODD)
    model = runs.save_model(local / "modèle [1] 猫")
    files = {f"modèle/{path.relative_to(model)}": path.read_bytes() for path in model.rglob("*") if path.is_file()}
    files |= {f"in ü/{name}": runs.png(number) for number, name in enumerate(REFERENCES)}
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"prompt": ["a"] * len(REFERENCES), "reference": [*REFERENCES]}), buffer)
    files["in ü/mänifest #1.parquet"] = buffer.getvalue().to_pybytes()
    for name, data in files.items():
        storage.publish_bytes(f"{place}/{name}", data)
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
    rows = [sample["json"] for name in ("00000", "00001") for sample in shards.read_samples(f"{output}/{name}.tar")]
    assert [row["reference"] for row in rows] == [*REFERENCES]
    assert all(row["clip_reference"] is not None for row in rows)
