"""Models are fetched by name, from a Hub on this machine, into the cache of this node or on to a folder or bucket."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from support import hub_server
from support.hub_server import Hub
from support.runs import write_files
from vcf_batch import storage
from vcf_batch.cli import main
from vcf_batch.commands import fetch
from vcf_batch.errors import StorageError
from vcf_batch.models import adapters, cache
from vcf_batch.models.cache import CACHE_VARIABLE
from vcf_batch.models.names import ADAPTERS, ADAPTERS_ID, PRESETS
from vcf_batch.models.resolution import resolve

SD15 = PRESETS["sd15"].base
BASE = {
    "model_index.json": b'{"_class_name": "StableDiffusionPipeline"}',
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.safetensors": b"unet",
    "unet/diffusion_pytorch_model.fp16.safetensors": b"half",
    "vae/config.json": b"{}",
    "vae/diffusion_pytorch_model.bin": b"vae!",
    "README.md": b"card",
}
KEPT = sorted(file for file in BASE if "fp16" not in file and "README" not in file)
CLIP = {"config.json": b"{}", "model.safetensors": b"tower", "pytorch_model.bin": b"tower"}
PUBLISHED = {
    "models/ip-adapter_sd15.safetensors": b"base",
    "models/ip-adapter-plus_sd15.safetensors": b"plus",
    "models/ip-adapter_sd15_vit-G.safetensors": b"large",
    "models/ip-adapter_sd15_light_v11.bin": b"light",
    **{f"models/image_encoder/{name}": data for name, data in CLIP.items()},
    **{f"sdxl_models/image_encoder/{name}": data + b" " for name, data in CLIP.items()},
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    with hub_server.running() as hub:
        hub.repositories |= {
            SD15: write_files(tmp_path / "sd15", BASE),
            ADAPTERS_ID: write_files(tmp_path / "adapters", PUBLISHED),
            "org/clip": write_files(tmp_path / "clip", CLIP),
        }
        yield hub


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["model", *map(str, arguments)])


def document(*arguments: object) -> dict[str, Any]:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def downloads(hub: type[Hub]) -> list[str]:
    """Files that were asked for, without the small ones that are read to judge a model."""
    return [path.rpartition("/")[2] for path in hub.requests if path.startswith("GET /") and "/resolve/" in path]


def test_a_name_fills_the_cache_once_and_the_list_says_so(hub: type[Hub]) -> None:
    """A preset brings its Stable Diffusion; an IP-Adapter its weights and its image encoder."""
    assert not [model for model in document("list")["models"] if model["cached"] and model["name"] != "tiny"]
    made = document("fetch", "sd15")
    assert made["source"] == SD15 and made["revision"] == hub_server.commit_of(SD15)
    assert (made["option"], made["files"]) == ("--model", len(KEPT))
    assert sorted(file for file in storage.list_tree(made["places"][0]) if not file.startswith(".")) == KEPT
    adapter = document("fetch", "ip-adapter-sd15")
    assert (adapter["option"], adapter["files"]) == ("--ip-adapter", 3)
    assert Path(adapter["places"][0]).read_bytes() == b"base"
    cached = {model["name"] for model in document("list")["models"] if model["cached"]}
    assert cached == {"tiny", "sd15", "ip-adapter-sd15"}
    assert "ip-adapter-sd15: " in (words := call("list").stdout) and "; in this node's cache" in words
    hub.requests.clear()
    Path(made["places"][0], ".model.json").unlink()  # as an older version leaves it
    assert call("fetch", "sd15").stdout == made["places"][0] + "\n"
    assert [model["cached"] for model in document("list")["models"] if model["name"] == "sd15"] == [True]
    assert "diffusion_pytorch_model.safetensors" not in downloads(hub)


def test_names_are_those_that_a_run_takes(hub: type[Hub]) -> None:
    """A run finds the weights of every name, with the image encoder that they were trained with."""
    write_files(hub.repositories[ADAPTERS_ID], {each.file: b"x" for each in ADAPTERS.values()})
    for name, known in ADAPTERS.items():
        found = adapters.resolve_adapter(name)
        assert (found.name, found.location, found.within) == (name, ADAPTERS_ID, known.file)
        assert adapters.encoder_beside(found).within == known.encoder
    by_id = adapters.resolve_adapter(f"{ADAPTERS_ID}:models/ip-adapter_sd15_vit-G.safetensors")
    assert adapters.encoder_beside(by_id).within == "sdxl_models/image_encoder"


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_a_copy_is_what_a_run_takes(hub: type[Hub], tmp_path: Path, request: pytest.FixtureRequest, place: str) -> None:
    """The layout is that of --model and --ip-adapter, and the record has revision and SHA-256 of each file."""
    to = str(tmp_path / "to") if place == "folder" else request.getfixturevalue("s3")
    made = document("fetch", "sd15", "--to", f"{to}/sd15")
    assert made["copied"] == made["files"] == len(KEPT) and made["places"] == [f"{to}/sd15"]
    record = json.loads(storage.read_bytes(f"{to}/sd15/vcf_batch_model.json"))
    assert (record["name"], record["source"]) == ("sd15", SD15)
    assert record["revision"] == hub_server.commit_of(SD15)
    assert record["files"].keys() == {*KEPT}
    assert record["files"]["unet/config.json"] == {
        "size": 2,
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }
    resolved = resolve(f"{to}/sd15")
    assert sorted(file for file in storage.list_tree(cache.fetch(resolved)) if file in KEPT) == KEPT
    if place == "folder":
        assert resolved.identity == resolve(str(tmp_path / "sd15")).identity, "the record counts for nothing"

    document("fetch", "ip-adapter-sd15-vit-g", "--to", f"{to}/adapter")
    adapter = adapters.resolve_adapter(f"{to}/adapter")
    assert adapter.within == "ip-adapter_sd15_vit-G.safetensors"
    encoder = cache.fetch(adapters.encoder_beside(adapter))
    assert Path(encoder, "model.safetensors").read_bytes() == CLIP["model.safetensors"] + b" "
    assert not Path(encoder, "pytorch_model.bin").exists()
    assert document("fetch", "org/clip", "--to", f"{to}/clip", "--revision", "v1")["option"] is None


def test_a_copy_that_was_cut_short_is_continued(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record is written last; what is there is not copied again, and what is of another revision is replaced."""
    to, upload = tmp_path / "to", storage.upload
    uploaded: list[str] = []

    def cut(path: str, url: str) -> None:
        if len(uploaded) == 2:
            raise StorageError("connection reset")
        uploaded.append(url)
        upload(path, url)

    monkeypatch.setattr(storage, "upload", cut)
    assert call("fetch", "sd15", "--to", to).exit_code == 1
    assert not (to / "vcf_batch_model.json").exists()
    (to / KEPT[0]).write_bytes(BASE[KEPT[0]][::-1])  # another content of the same size
    uploaded.clear()
    monkeypatch.setattr(storage, "upload", upload)
    made = document("fetch", "sd15", "--to", to)
    assert (made["files"], made["copied"]) == (len(KEPT), len(KEPT) - 1)
    assert {file: (to / file).read_bytes() for file in KEPT} == {file: BASE[file] for file in KEPT}
    assert document("fetch", "sd15", "--to", to)["copied"] == 0
    (to / KEPT[-1]).unlink()
    assert document("fetch", "sd15", "--to", to)["copied"] == 1


def test_a_place_with_another_model_is_refused(hub: type[Hub], tmp_path: Path) -> None:
    """So that a run never reads half of one and half of another."""
    document("fetch", "sd15", "--to", tmp_path / "to")
    refused = call("fetch", "org/clip", "--to", tmp_path / "to")
    assert refused.exit_code == 2
    assert f"has {SD15} in revision" in refused.stderr and "give another place with --to" in refused.stderr
    (tmp_path / "to" / "vcf_batch_model.json").write_text("{")
    refused = call("fetch", "sd15", "--to", tmp_path / "to")
    assert refused.exit_code == 2 and "vcf_batch_model.json that cannot be read" in refused.stderr
    write_files(tmp_path / "else", {"text_encoder/model.safetensors": b"x"})
    refused = call("fetch", "sd15", "--to", tmp_path / "else")
    assert refused.exit_code == 2
    assert "other files that would count as the model's, such as text_encoder/model.safetensors" in refused.stderr
    assert not (tmp_path / "else" / "unet").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiny",), "'tiny' is embedded in this package, so there is nothing to fetch"),
        (("sd16",), "'sd16' is no name that 'vcf-batch model list' has, and no Hub id such as"),
        (("s3://bucket/model",), "is a folder or URL already, which --model and --ip-adapter take as it is"),
        (("org/none",), "there is no model 'org/none' on http"),
        (("sd15", "--revision", "v9"), f"{SD15} has no revision 'v9'; give a branch, tag or commit"),
        ((f"{ADAPTERS_ID}:models/none.bin",), f"{ADAPTERS_ID} on the Hub has no models/none.bin"),
        (("org/clip:model.safetensors",), "has no usable folder image_encoder"),
        (("org/gated",), "org/gated is gated: accept its terms on http"),
    ],
)
def test_what_cannot_be_fetched_is_refused_with_the_remedy(
    hub: type[Hub], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    hub.repositories["org/gated"] = tmp_path
    hub.gated.add("org/gated")
    refused = call("fetch", *arguments, "--to", tmp_path / "to")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert message in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("name", ["sd15", "ip-adapter-sd15", "org/clip", f"{ADAPTERS_ID}:models/ip-adapter_sd15.bin"])
def test_a_hub_that_is_not_reached_is_a_message(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused = call("fetch", name, "--to", tmp_path / "to")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "from the model hub http://127.0.0.1:9" in refused.stderr
    assert "'vcf-batch model fetch " in refused.stderr and "Traceback" not in refused.stderr


def test_a_connection_that_dies_fails_the_fetch_and_the_next_one_goes_on(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With exit code 1, for another try may do; files that have arrived are not downloaded again."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's tries
    hub.dying.add("diffusion_pytorch_model.bin")
    failed = call("fetch", "sd15")
    assert failed.exit_code == 1 and f"cannot get {SD15} from the model hub" in failed.stderr
    assert not [model for model in document("list")["models"] if model["name"] == "sd15" and model["cached"]]
    hub.dying.clear()
    hub.requests.clear()
    assert call("fetch", "sd15").exit_code == 0
    assert "diffusion_pytorch_model.safetensors" not in downloads(hub)


def test_a_file_that_is_damaged_in_the_cache_is_downloaded_again(hub: type[Hub]) -> None:
    """The client of the Hub would take a file that it once downloaded for whole, whatever became of it."""
    folder = document("fetch", "sd15")["places"][0]
    damaged = Path(folder, "unet/diffusion_pytorch_model.safetensors")
    os.truncate(damaged, 1)
    assert not [model for model in document("list")["models"] if model["name"] == "sd15" and model["cached"]]
    assert document("fetch", "sd15")["places"] == [folder]
    assert damaged.read_bytes() == BASE["unet/diffusion_pytorch_model.safetensors"]


def test_progress_goes_to_standard_error(hub: type[Hub], tmp_path: Path) -> None:
    result = call("fetch", "sd15", "--to", tmp_path / "to")
    assert result.stdout == f"{tmp_path / 'to'}: {len(KEPT)} files, 0.00 MB, {len(KEPT)} of them copied\n"
    lines = [line for line in result.stderr.splitlines() if line.startswith(("sd15 is", SD15)) or " of " in line]
    assert lines[0] == f"sd15 is {SD15} in revision {hub_server.commit_of(SD15)}"
    assert lines[-1] == f"{len(KEPT)} of {len(KEPT)}: {KEPT[-1]}, 0.00 MB, copied"
    assert fetch.size_in_words(3_440_000_000) == "3.44 GB"
