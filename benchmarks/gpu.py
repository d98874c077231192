"""Measure all figures of speed on a GPU in one run of at most nine minutes: ``python benchmarks/gpu.py --out FOLDER``.

The benchmark builds Stable Diffusion 2.1 and ViT-H with random weights on the device (``full_size.py``), or with
``--family sdxl`` Stable Diffusion XL, for which nobody has set goals. It compares their output with float32 and with
the path that is not optimised, and then measures. It prints a Markdown table, and after each row it writes all rows so
far to ``FOLDER/gpu.json``. A failure costs the rest of its own measurement only.

It needs neither Ray nor torchvision; without an installation, run ``PYTHONPATH=. python benchmarks/gpu.py``.

``--smoke`` runs the same code on the CPU at tiny shapes. Its figures mean nothing.

``gpu_rows.py`` lists the measurements.
"""

import contextlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from gpu_record import Measurement, Record

PACKAGES = ("torch", "diffusers", "transformers", "tokenizers", "triton", "numpy", "pyarrow", "pillow")


@click.command()
@click.option("--smoke", is_flag=True, help="Run on the CPU at tiny shapes, as a test of the code.")
@click.option("--only", multiple=True, metavar="NAME", help="A measurement, or a section of them. Repeatable.")
@click.option("--family", type=click.Choice(("sd21", "sdxl")), default="sd21", show_default=True)
@click.option("--minutes", default=8.5, show_default=True, help="Time of the whole, with the import of libraries.")
@click.option("--out", metavar="FOLDER", help="Write the rows to gpu.json in this folder, after each of them.")
@click.option("--list", "listed", is_flag=True, help="List the measurements with their estimated time, and stop.")
def main(smoke: bool, only: tuple[str, ...], family: str, minutes: float, out: str | None, listed: bool) -> None:
    """Print the table. Exit with 1 if a measurement failed or a required figure is not met."""
    deadline = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="vcf-batch-compiled-", ignore_cleanup_errors=True) as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as runs have it; read when CUDA starts
        import gpu_rows  # now, because it brings torch and the models' libraries
        import torch
        from gpu_bench import Bench

        chosen = _chosen(gpu_rows.MEASUREMENTS, only)
        if listed:
            for one in chosen:
                click.echo(f"{one.name}: {one.seconds:g} s and the sampling of {one.images:g} images")
            return
        if not smoke and not torch.cuda.is_available():
            raise click.UsageError(f"torch {torch.__version__} sees no GPU; --smoke runs the same code on the CPU")
        record = Record(out, about() | {"family": family})
        record.measure(chosen, Bench(smoke, family), deadline)
    if record.failed:
        raise SystemExit(f"failed: {', '.join(record.failed)}")


def _chosen(measurements: Sequence[Measurement], only: Sequence[str]) -> list[Measurement]:
    """The measurements of these names or sections, in their own order; all of them without a name.

    Raises:
        UsageError: there is none of a name.
    """
    known = {name for one in measurements for name in (one.name, one.name.split("/")[0])}
    if unknown := sorted({*only} - known):
        raise click.UsageError(f"--only is {', '.join(unknown)}; it must be one of {', '.join(sorted(known))}")
    wanted = only or known
    return [one for one in measurements if one.name in wanted or one.name.split("/")[0] in wanted]


def about() -> dict[str, Any]:
    """What the JSON says of the run as a whole: command, commit and versions."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": versions,
        "cpus": len(os.sched_getaffinity(0)),
    }


def _commit() -> str | None:
    """The commit of the working tree, with ``+`` if it has changed; None where there is no git or no history."""
    folder = Path(__file__).parent
    try:
        commit, changes = (
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes else "")


if __name__ == "__main__":
    main()
