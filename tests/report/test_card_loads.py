"""A dataset is loaded by what nobody here wrote, from its card alone: each block of the card is run in the folder."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import mixed
from vcf_batch.output.output import Output
from vcf_batch.report import card

# JPEGs are a name more than PNGs, which `make test-all` tries.
KINDS = [("png", False), ("webp", True), pytest.param(("jpg", False), marks=pytest.mark.slow)]
one_kind = pytest.mark.parametrize("output", KINDS[:1], indirect=True, ids=["png"])
SUCCESSES = mixed.ROWS - len(mixed.FAILED | mixed.REJECTED)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}{' triplets' if kind[1] else ''}")
def output(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text-only rows first, rejected rows, a shard of failures and columns that are null up to the last row."""
    image_format, triplets = request.param
    folder = tmp_path_factory.mktemp("loads")
    mixed.write(folder, image_format, triplets)
    card.write(Output(str(folder / "out")))
    return folder / "out"


def blocks(output: Path) -> dict[str, str]:
    """The blocks of the card, by the library that each is about."""
    found = re.findall(r"```python\n(.*?)```", (output / "README.md").read_text(), re.DOTALL)
    return {re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)[-1]: code for code in found}


def run(code: str, output: Path, tmp_path: Path) -> str:
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=output, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_card_has_a_block_for_each_reader(output: Path) -> None:
    assert [*blocks(output)] == ["webdataset", "datasets", "ray", "pandas", "polars", "duckdb"]


def test_webdataset(output: Path, tmp_path: Path) -> None:
    assert "000000000 a red disc (32, 32) 0.0" in run(blocks(output)["webdataset"], output, tmp_path)


def test_datasets(output: Path, tmp_path: Path) -> None:
    """In full and streaming: every value arrives, whatever came first."""
    more = """
import json
streamed = list(load_dataset(str(Path.cwd()), split="train", streaming=True))
rows = [sample["json"] for sample in dataset]
assert rows == [sample["json"] for sample in streamed]
images = [name for name in dataset.column_names if name.split(".")[-1] in ("png", "webp", "jpg")]
assert all(sample[name].size == (32, 32) for samples in (dataset, streamed) for sample in samples for name in images)
by_tars = load_dataset("webdataset", data_files="*.tar", split="train", features=dataset.features)
assert [sample["json"] for sample in by_tars] == rows
print(json.dumps({"columns": dataset.column_names, "first": rows[0], "last": rows[-1]}))
"""
    printed = run(blocks(output)["datasets"] + more, output, tmp_path).splitlines()
    assert f"{SUCCESSES} a red disc <PIL" in printed[0]
    found = json.loads(printed[-1])
    ending = Output(str(output)).config.image_format
    images = [ending] if ending != "webp" else ["webp", "content.webp", "style.webp"]
    assert found["columns"] == [*images, "txt", "json", "__key__", "__url__"]
    assert {name: found["last"][name] for name in mixed.carried()} == mixed.LAST
    assert all(found["first"][name] is None for name in mixed.carried())


@one_kind
def test_datasets_loads_what_is_there_and_not_what_it_has_loaded_before(output: Path, tmp_path: Path) -> None:
    """Another output of the same name, and the same output after a repair, once its card is written again."""
    code = "import os; from datasets import load_dataset; print(len(load_dataset(os.getcwd(), split='train')))"
    assert run(code, output, tmp_path).split()[-1] == str(SUCCESSES)
    other = tmp_path / "other" / "out"
    shutil.copytree(output, other)
    for file in other.glob("00000*"):
        file.unlink()
    card.write(Output(str(other)))
    assert int(run(code, other, tmp_path).split()[-1]) < SUCCESSES


@one_kind
def test_pandas(output: Path, tmp_path: Path) -> None:
    assert "rejected" in run(blocks(output)["pandas"] + f"assert len(rows) == {mixed.ROWS}", output, tmp_path)


@one_kind
def test_polars(output: Path, tmp_path: Path) -> None:
    assert str(SUCCESSES) in run(blocks(output)["polars"], output, tmp_path)


@one_kind
def test_duckdb(output: Path, tmp_path: Path) -> None:
    assert str(SUCCESSES) in run(blocks(output)["duckdb"], output, tmp_path)


@pytest.mark.slow
def test_ray_data(output: Path, tmp_path: Path) -> None:
    code = "import ray; ray.init(address='local', num_cpus=1, include_dashboard=False)\n" + blocks(output)["ray"]
    assert f"{SUCCESSES} a red disc" in run(code, output, tmp_path)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@one_kind
@pytest.mark.parametrize("workers", range(1, 9))
def test_webdataset_with_any_number_of_workers(output: Path, workers: int) -> None:
    """A DataLoader gives each sample once: with up to as many workers as there are tars as it is, and with any number
    of them by ``empty_check=False``."""
    import torch
    import webdataset

    tars = Output(str(output)).tars()
    assert len(tars) == 3 and [Path(tar).name for tar in tars] == sorted(path.name for path in output.glob("*.tar"))
    options: dict[str, Any] = {} if workers <= len(tars) else {"empty_check": False}
    samples = webdataset.WebDataset(tars, shardshuffle=False, **options).to_tuple("__key__")
    keys = [key for (key,) in torch.utils.data.DataLoader(samples, batch_size=None, num_workers=workers)]
    assert sorted(keys) == [f"{row:09}" for row in range(mixed.ROWS) if row not in mixed.FAILED | mixed.REJECTED]


@one_kind
def test_rows_alike_collate(output: Path) -> None:
    """default_collate makes a batch of KEY.json, where what is null is no key; of rows that differ in it, none."""
    import webdataset
    from torch.utils.data import default_collate

    samples = webdataset.WebDataset(Output(str(output)).tars(), shardshuffle=False).decode("torchrgb")
    rows = [sample["json"] for sample in samples]
    batch = default_collate(rows[:5])
    assert batch["clip_score"].tolist() == [row / 16 for row in (0, 1, 2, 4, 5)]
    assert len(batch["prompt"]) == 5 and not {"label", "error_message"} & batch.keys()
    with pytest.raises(KeyError):
        default_collate([rows[-1], rows[0]])


def test_the_types_of_the_header_are_those_that_datasets_writes(output: Path) -> None:
    """Whatever its columns are: what datasets makes of the YAML is written as the same YAML again."""
    import datasets
    import yaml

    written = yaml.safe_load((output / "README.md").read_text().split("---\n")[1])["dataset_info"]["features"]
    features = datasets.Features._from_yaml_list(written)
    assert features._to_yaml_list() == written
    assert isinstance(features[Output(str(output)).config.image_format], datasets.Image)
