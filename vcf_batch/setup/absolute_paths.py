"""Absolute paths, which mean the same to every process of a run."""

from pathlib import Path

from vcf_batch import storage
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import UsageError
from vcf_batch.models.resolution import tiny_folder

BUILT_IN = ("demo", "roles")
"""Names of the manifests that come with the package. A folder of such a name is written as ``./demo``."""


def absolute(config: RunConfig) -> RunConfig:
    """Make the paths of a run absolute, so that they mean the same to every process.

    Raises:
        UsageError: see :func:`absolute_output`.
    """
    return config.replace(
        manifest=storage.absolute(built_in(config.manifest)),
        output=absolute_output(config.output),
        reference_root=tuple(storage.absolute(root) for root in config.reference_root),
    )


def built_in(manifest: str) -> str:
    """The place of a manifest that comes with the package, one of :data:`BUILT_IN`; any other name as it is."""
    if manifest not in BUILT_IN:
        return manifest
    # A checkout has a link there, and references are read without following links.
    return str((Path(tiny_folder()).parent / "manifests").resolve() / f"{manifest}.parquet")


def absolute_output(url: str) -> str:
    """The absolute path, or the URL, of an output.

    Raises:
        UsageError: the output lies in the temporary working directory of a Ray job, where a relative one would go.
    """
    output = storage.absolute(url)
    if storage.is_local(output) and any(map(_is_job_copy, Path(output).parts)):
        raise UsageError(
            f"output {url!r} lies in the temporary copy of the directory that this job was submitted with "
            f"({output}), which Ray deletes: name an absolute path on shared storage, or a URL such as s3://bucket/folder"
        )
    return output


def _is_job_copy(folder: str) -> bool:
    return folder == "working_dir_files" or folder.startswith("_ray_pkg_")
