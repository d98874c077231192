"""Roles before a run: what no worker could do is told by the driver, from the model's files alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from support import runs, tiny_models
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import ModelError, UsageError
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.models import resolution
from vcf_batch.setup import model_check, run_models
from vcf_batch.setup.job import fusions_of, is_limited, roles_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_model(tmp_path_factory.mktemp("roles") / "model")


def opened(folder: Path, model: Path, columns: dict[str, list[Any]], **settings: Any) -> tuple[RunConfig, Manifest]:
    url = str(runs.write_manifest(folder, 3, columns))
    config = RunConfig(manifest=url, output="out", model=str(model), lpips="none", **settings)
    return config, Manifest.open(url)


def check(folder: Path, model: Path, columns: dict[str, list[Any]], **settings: Any) -> None:
    config, manifest = opened(folder, model, columns, **settings)
    model_check.check(config, manifest, run_models.resolve(config), fusions_of(config, manifest))


def test_roles_are_those_of_the_run_and_of_its_rows(tmp_path: Path, model: Path) -> None:
    """In lists, too. A run without roles and masks has no limits."""
    lists: dict[str, list[Any]] = {"reference": [["reference0.png"]] * 3, "reference_roles": [["style"], [None], None]}
    config, manifest = opened(tmp_path, model, lists, role="layout")
    assert roles_of(config, manifest) == {"style", "layout"}
    config, manifest = opened(tmp_path, model, {"reference_roles": ["palette", "all", None]})
    assert roles_of(config, manifest) == {"all", "palette"} and is_limited(config, manifest)
    config, manifest = opened(tmp_path, model, {})
    assert roles_of(config, manifest) == {"all"} and not is_limited(config, manifest)
    assert is_limited(config.replace(role="layout"), manifest)


def test_a_role_without_its_projection_is_refused(tmp_path: Path, model: Path) -> None:
    told = r"the role style needs a projection, and .* has none: fit one with"
    with pytest.raises(ModelError, match=told):
        check(tmp_path, model, {}, role="style")
    with pytest.raises(ModelError, match=told):
        check(tmp_path, model, {"reference_roles": ["all", "style", None]})
    check(tmp_path, model, {"reference_roles": ["layout", "all", None]})


def test_a_role_without_references_is_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(UsageError, match="role is layout, but the manifest has no references"):
        check(tmp_path, model, {"reference": [None] * 3}, role="layout")


def projection(**others: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a projection of 5 tokens."""
    width = tiny_models.TEXT_WIDTH
    return {"mean": torch.zeros(5, width), "down": torch.zeros(1, width), "up": torch.zeros(width, 1)} | others


def a_file(tensors: dict[str, torch.Tensor], role: str = "style") -> bytes:
    return save({f"{role}.{name}": tensor for name, tensor in tensors.items()})


def a_header(text: bytes) -> bytes:
    """A safetensors file without tensors."""
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "header"),
        (b"a web page, or a pointer of Git LFS", "header"),
        (a_header(b"{"), "header"),
        (a_header(b"[1]"), "header"),
        (a_header(b"5"), "header"),
        (a_header(b"[" * 100_000), "header"),
        (a_file(projection())[:-3], "incomplete"),
        (save({"style": torch.zeros(1)}), r"it lacks style\.mean"),
        (a_file({"mean": torch.zeros(5, 4), "down": torch.zeros(1, 4)}), r"it lacks style\.up"),
        (a_file(projection(mean=torch.zeros(32))), r"the shapes \[32\], \[1, 32\] and \[32, 1\], which do not fit"),
        (a_file(projection(up=torch.zeros(32, 2))), "which do not fit each other"),
        (
            a_file({"mean": torch.zeros(5, 4), "down": torch.zeros(1, 4), "up": torch.zeros(4, 1)}),
            "it is for tokens of width 4, and the aligner's have 32",
        ),
    ],
    ids=["empty", "text", "json", "list", "number", "deep", "cut", "name", "lacking", "flat", "rank", "width"],
)
def test_a_file_of_projections_that_no_worker_could_use_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    """Its header is enough for it. Another aligner's file is one, too."""
    folder = runs.save_model(tmp_path / "model")
    (folder / "aligner" / "roles.safetensors").write_bytes(data)
    told = rf"aligner/roles\.safetensors of .* cannot be used: .*{reason}.*fit the roles again"
    with pytest.raises(ModelError, match=told):
        model_check.stored_roles(resolution.resolve(str(folder)))


def test_a_file_of_projections_may_say_who_wrote_it(tmp_path: Path) -> None:
    """Metadata in its header are no role."""
    folder = runs.save_model(tmp_path / "model")
    tensors = {f"style.{name}": tensor for name, tensor in projection().items()}
    (folder / "aligner" / "roles.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    assert model_check.stored_roles(resolution.resolve(str(folder))) == {"style"}
