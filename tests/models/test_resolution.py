"""Models are resolved to an exact version, fetched once per node, and never run code."""

import inspect
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from support import hub_server
from support.runs import write_files
from vcf_batch import storage
from vcf_batch.errors import ModelError, StorageError
from vcf_batch.models import model_files, resolution
from vcf_batch.models.cache import _MARKER, CACHE_VARIABLE, fetch
from vcf_batch.models.names import PRESETS
from vcf_batch.models.resolution import ResolvedModel, resolve
from vcf_batch.setup import run_models
from vcf_batch.vcf.base.pipeline_xl import VCFXLPipeline
from vcf_batch.vcf.pipeline import VCFPipeline

FILES = {
    "model_index.json": b'{"_class_name": "VCFPipeline"}',
    "unet/config.json": b'{"_class_name": "UNet2DConditionModel"}',
    "unet/diffusion_pytorch_model.safetensors": b"unet weights",
    "tokenizer/merges.txt": b"a b",
}


def write(folder: Path, files: dict[str, bytes]) -> str:
    return str(write_files(folder, files))


def tree(folder: str) -> dict[str, bytes]:
    return {name: Path(folder, name).read_bytes() for name in storage.list_tree(folder) if not name.startswith(".")}


@pytest.fixture
def model_folder(tmp_path: Path) -> str:
    return write(tmp_path / "model", FILES)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_every_part_that_a_pipeline_loads_counts() -> None:
    """Other folders of a repository do not: a part without its place in the list would never be fetched."""
    parts = {run_models.OWN_JUDGE, run_models.OWN_PROBE, run_models.OWN_GUIDE, run_models.OWN_SAFETY}
    for pipeline in (VCFPipeline, VCFXLPipeline):
        given = inspect.signature(pipeline).parameters.values()
        parts |= {each.name for each in given if each.default in (inspect.Parameter.empty, None)} - {"default_strength"}
    files = [f"{part}/config.json" for part in sorted(parts)]
    assert model_files.chosen(["model_index.json", *files]) == sorted(["model_index.json", *files])


def test_tiny_is_the_package_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "tiny", FILES | {"README.md": b"card"})
    monkeypatch.setattr(resolution, "tiny_folder", lambda: folder)
    monkeypatch.setattr("vcf_batch.models.cache.tiny_folder", lambda: folder)
    tiny = resolve("tiny")
    assert (tiny.kind, fetch(tiny)) == ("tiny", folder)
    Path(folder, "README.md").write_bytes(b"a better card")
    Path(folder, "README.txt").write_bytes(b"another")
    assert resolve("tiny") == tiny


def test_a_folder_is_used_in_place_and_named_by_its_contents(
    model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = resolve(model_folder)
    assert resolved.kind == "directory"
    assert fetch(pickle.loads(pickle.dumps(resolved))) == model_folder
    monkeypatch.chdir(tmp_path)
    assert resolve("model") == ResolvedModel("model", "directory", model_folder, resolved.identity)
    assert resolve(write(tmp_path / "copy", FILES)).identity == resolved.identity
    write(tmp_path / "copy", {"unet/diffusion_pytorch_model.safetensors": b"Unet weights"})
    assert resolve(str(tmp_path / "copy")).identity != resolved.identity


def test_a_single_file_is_found_without_a_look_at_what_lies_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may lie in a home with folders that nobody may read, or in a bucket with millions of objects."""
    names = {"a.safetensors": b"a", "b.safetensors": b"b"}
    folder = write(tmp_path / "home", names)
    place = "memory://bucket"
    for name, data in names.items():
        storage.publish_bytes(f"{place}/{name}", data)
    found = [resolution.resolve_file(f"{where}/a.safetensors").identity for where in (folder, place)]

    list_tree = storage.list_tree

    def refused(url: str) -> dict[str, int]:
        if url in (folder, place):
            raise PermissionError(url)
        return list_tree(url)

    for listing in ("list_tree", "list_checksums"):
        monkeypatch.setattr(storage, listing, refused)
    assert [resolution.resolve_file(f"{where}/a.safetensors").identity for where in (folder, place)] == found
    assert Path(fetch(resolution.resolve_file(f"{place}/a.safetensors"))).read_bytes() == b"a"
    for where in (folder, place):
        with pytest.raises(ModelError, match=r"has no c\.safetensors; the weights that it has are a\.safetensors, b"):
            resolution.resolve_file(f"{where}/c.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_folder_may_be_named_like_a_file(name: str, tmp_path: Path) -> None:
    """Programs that convert a checkpoint name the folder after it."""
    folder = write(tmp_path / name, FILES)
    assert resolve(folder).kind == "directory" and not resolve(folder).layout


def test_another_model_on_a_node_is_refused(model_folder: str, tmp_path: Path) -> None:
    resolved = resolve(model_folder)
    write(tmp_path / "model", {"unet/diffusion_pytorch_model.safetensors": b"changed"})
    with pytest.raises(ModelError, match=rf"another model .* that started the run \({resolved.identity[:12]}\)"):
        fetch(resolved)
    for name in FILES:
        Path(model_folder, name).unlink()
    with pytest.raises(ModelError, match=r"there is no model in .* on this node; put it there, or give the URL"):
        fetch(resolved)


@pytest.mark.parametrize("name", ["tinny", "./nowhere", "/nowhere/model", "a/b/c", "org/../model"])
def test_an_unknown_name_says_what_is_possible(name: str) -> None:
    with pytest.raises(ModelError, match=r"is not a folder here .*give 'tiny', a folder"):
        resolve(name)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_no_model_before_it_is_assembled(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """generate says how a model is made of a preset, unless there is a folder of that name."""
    with pytest.raises(ModelError, match=f"model train --model {name}.*model assemble --base {name} --aligner DIR"):
        resolve(name)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name, FILES)
    assert resolve(name).kind == "directory"


@pytest.mark.parametrize("name", ["tiny", "memory://models/x", "."])
def test_a_revision_is_for_the_hub_only(name: str) -> None:
    with pytest.raises(ModelError, match=r"revision is 'main', but the model .* is not a Hub id"):
        resolve(name, "main")


# Nothing runs that the user did not bring


@pytest.mark.parametrize("suffix", ["pkl", "pt", "ckpt"])
def test_weights_that_are_only_a_pickle_are_refused(tmp_path: Path, suffix: str) -> None:
    """Nothing runs that the user did not bring: safetensors or weights_only loading."""
    pickled = f"text_encoder/pytorch_model.{suffix}"
    folder = write(tmp_path / "m", FILES | {"text_encoder/config.json": b"{}", pickled: b"x"})
    with pytest.raises(ModelError, match=rf"weights only as a pickle, .*: {pickled}\. Convert it to safetensors"):
        resolve(folder)
    write(tmp_path / "m", {"text_encoder/model.safetensors": b"x"})
    assert "pickle" not in str(resolve(folder))


def test_a_lone_checkpoint_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"only as a pickle, .*: sd\.ckpt"):
        resolve(write(tmp_path / "a", {"sd.ckpt": b"x"}))
    with pytest.raises(ModelError, match=r"has no \.safetensors or \.bin file"):
        resolve(write(tmp_path / "b", {"notes.txt": b"x"}))


def test_code_of_the_model_s_own_is_refused_at_a_url_too(tmp_path: Path) -> None:
    """Nothing runs that the user did not bring: no remote code."""
    config = json.dumps({"auto_map": {"AutoModel": "modeling.Evil"}}).encode()
    folder = write(tmp_path / "m", FILES | {"config.json": config})
    with pytest.raises(ModelError, match=r"wants to run code of its own \('auto_map' in config.json\)"):
        resolve(f"local://{folder}")


def test_only_the_model_s_own_files_count() -> None:
    kept = [
        "model_index.json",
        "unet/config.json",
        "unet/a.safetensors",
        "vae/b.fp16.safetensors",
        "tokenizer/vocab.json",
    ]
    left_out = [
        "README.md", "README.txt", "preview.png", "v2-1_768-ema-pruned.safetensors", "unet/a.fp16.safetensors",
        "unet/a.non_ema.safetensors", "unet/a.bin", "unet/modeling.py", ".git/config.json",
        ".cache/huggingface/x.json", "../../evil.json", "/etc/evil.json", "unet/../../evil.json",
    ]  # fmt: skip
    assert model_files.chosen(left_out + kept) == sorted(kept)
    only_bin = ["config.json", "pytorch_model.bin"]
    assert model_files.chosen([*only_bin, "tf_model.h5"]) == only_bin
    both = ["config.json", "open_clip_model.safetensors", "open_clip_config.json", "pytorch_model.bin"]
    assert model_files.chosen(both) == only_bin, "OpenCLIP's names are not those that transformers loads"
    sharded = ["m-00001-of-00002.safetensors", "m.fp16-00001-of-00002.safetensors", "m.safetensors.index.fp16.json"]
    assert model_files.chosen([*sharded, "m.safetensors.index.json"]) == [sharded[0], "m.safetensors.index.json"]
    in_shards = ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "m.safetensors.index.json"]
    assert model_files.chosen([*in_shards, "m.fp16.safetensors"]) == sorted(in_shards)
    assert model_files.chosen(["m.safetensors", *sharded[1:]]) == ["m.safetensors"]


def test_of_stable_diffusion_xl_on_the_hub_only_what_loads_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are those of ``stabilityai/stable-diffusion-xl-base-1.0``, with a byte each."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    weights = {
        "unet": "diffusion_pytorch_model",
        "vae": "diffusion_pytorch_model",
        "text_encoder": "model",
        "text_encoder_2": "model",
    }
    kept = [
        *("model_index.json", "scheduler/scheduler_config.json"),
        *(f"{part}/config.json" for part in weights),
        *(f"{part}/{name}.safetensors" for part, name in weights.items()),
        *(
            f"{part}/{name}"
            for part in ("tokenizer", "tokenizer_2")
            for name in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
        ),
    ]
    flax = {"unet": "diffusion_flax_model", "vae": "diffusion_flax_model"}
    beside = [
        *("README.md", "LICENSE.md", "01.png", "sd_xl_base_1.0.safetensors", "sd_xl_base_1.0_0.9vae.safetensors"),
        *("sd_xl_offset_example-lora_1.0.safetensors", "vae_1_0/config.json"),
        *(f"vae_1_0/diffusion_pytorch_model{variant}.safetensors" for variant in ("", ".fp16")),
        *(f"{part}/{name}.fp16.safetensors" for part, name in weights.items()),
        *(f"{part}/{flax.get(part, 'flax_model')}.msgpack" for part in weights),
        *(
            f"{part}/{name}"
            for part in ("unet", "text_encoder", "text_encoder_2", "vae_encoder", "vae_decoder")
            for name in ("model.onnx", "openvino_model.bin", "openvino_model.xml")
        ),
        *(
            "unet/model.onnx_data",
            "text_encoder_2/model.onnx_data",
            "vae_encoder/config.json",
            "vae_decoder/config.json",
        ),
    ]
    with hub_server.running() as served:
        names = {file: b"{}" if file.endswith(".json") else b"x" for file in kept + beside}
        served.repositories["org/xl"] = Path(write(tmp_path / "xl", names))
        folder = fetch(resolve("org/xl"))
    assert sorted(file for file in storage.list_tree(folder) if not file.startswith(".")) == sorted(kept)


# URLs


def test_a_url_is_fetched_once_and_whole(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name, data in FILES.items():
        memory.pipe_file(f"/models-test/sd/{name}", data)
    memory.pipe_file("/models-test/sd/preview.png", b"not needed")
    resolved = resolve("memory://models-test/sd")
    assert resolved.kind == "url"
    downloads: list[str] = []
    download = storage.download

    def counted(url: str, path: str) -> None:
        downloads.append(url)
        download(url, path)

    monkeypatch.setattr(storage, "download", counted)
    with ThreadPoolExecutor(6) as threads:
        folders = set(threads.map(fetch, [resolved] * 6))
    assert len(folders) == 1
    assert len(downloads) == len(FILES)
    folder = folders.pop()
    assert tree(folder) == FILES
    assert Path(folder).is_relative_to(cache)

    Path(folder, "tokenizer/merges.txt").write_bytes(b"")
    assert tree(fetch(resolved)) == FILES
    assert len(downloads) == len(FILES) + 1

    memory.pipe_file("/models-test/sd/unet/diffusion_pytorch_model.safetensors", b"new! weights")
    assert resolve("memory://models-test/sd").identity != resolved.identity
    Path(folder, _MARKER).unlink()
    with pytest.raises(ModelError, match="has changed since the run was started"):
        fetch(resolved)


def test_a_url_is_named_by_the_checksums_of_its_store(model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the store keeps checksums the contents are not read; where it has none they are hashed."""
    url = f"local://{model_folder}"
    assert resolve(url).identity == resolve(model_folder).identity
    monkeypatch.setattr(storage, "list_checksums", lambda url: dict.fromkeys(FILES, (1, "etag")))
    monkeypatch.setattr(resolution, "_content_identity", None)
    by_checksum = resolve(url).identity
    monkeypatch.setattr(storage, "list_checksums", lambda url: dict.fromkeys(FILES, (1, "other etag")))
    assert resolve(url).identity != by_checksum


def test_an_absent_url_and_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"memory://nowhere/x has no \.safetensors or \.bin file") as refused:
        resolve("memory://user:secret@nowhere/x")
    assert "secret" not in str(refused.value)

    def refuse(url: str) -> dict[str, int]:
        raise PermissionError(13, "refused", url)

    monkeypatch.setattr(storage, "list_checksums", refuse)
    with pytest.raises(ModelError, match=r"the model at memory://x/y cannot be read: .*refused"):
        resolve("memory://x/y")
    # The driver could read it, so where a worker cannot, its node is to blame.
    with pytest.raises(StorageError, match=r"this node cannot read the model at memory://x/y: .*refused"):
        fetch(ResolvedModel("memory://x/y", "url", "memory://x/y", "0"))


FETCH = """
import os, pickle, sys
from vcf_batch import storage
from vcf_batch.models import cache, resolution
die_after, log = int(sys.argv[2]), sys.argv[3]
download = storage.download
def counted(url, path):
    download(url, path)
    with open(log, "a") as file:
        file.write(url + "\\n")
    if sum(1 for _ in open(log)) == die_after:
        os._exit(9)
storage.download = counted
cache.FILE_THREADS = 1
print(cache.fetch(pickle.loads(bytes.fromhex(sys.argv[1]))))
"""


def start_fetch(resolved: ResolvedModel, log: Path, die_after: int = 0) -> "subprocess.Popen[str]":
    arguments = [pickle.dumps(resolved).hex(), str(die_after), str(log)]
    return subprocess.Popen([sys.executable, "-c", FETCH, *arguments], stdout=subprocess.PIPE, text=True)


def test_processes_that_race_download_once(model_folder: str, tmp_path: Path) -> None:
    """Each node fetches a model once, under a file lock."""
    resolved, log = resolve(f"local://{model_folder}"), tmp_path / "log"
    printed = {process.communicate(timeout=60)[0].strip() for process in [start_fetch(resolved, log) for _ in range(3)]}
    assert len(printed) == 1
    assert tree(printed.pop()) == FILES
    assert len(log.read_text().splitlines()) == len(FILES)


def test_a_fetch_killed_in_the_middle_is_completed(model_folder: str, cache: Path, tmp_path: Path) -> None:
    """The marker is written last, so its existence means that the download completed."""
    resolved, log = resolve(f"local://{model_folder}"), tmp_path / "log"
    process = start_fetch(resolved, log, die_after=2)
    process.communicate(timeout=60)
    assert process.returncode == 9
    assert not list(cache.rglob(_MARKER))
    interrupted = next(path for path in (cache / "models").iterdir() if path.is_dir())
    (interrupted / ".tmp-half").write_bytes(b"half a file")
    assert tree(fetch(resolved)) == FILES
    assert len(list(cache.rglob(_MARKER))) == 1
    assert not list(cache.rglob(".tmp-*"))


def test_a_cache_that_cannot_be_written_says_how_to_move_it(
    model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(ModelError, match=f"set {CACHE_VARIABLE} to a folder"):
        fetch(resolve(f"local://{model_folder}"))


# The Hugging Face Hub

RESOLVE = """
from vcf_batch.models import cache, resolution
from vcf_batch.errors import VcfBatchError
resolved = resolution.ResolvedModel("a", "hub", "a/b", "0" * 40)
for call in (lambda: resolution.resolve("org/model"), lambda: cache.fetch(resolved)):
    try:
        call()
    except VcfBatchError as error:
        print(type(error).__name__, error)
"""


@pytest.mark.parametrize("setting", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}], ids=str)
def test_an_unreachable_hub_says_what_to_do(setting: dict[str, str]) -> None:
    """Resolving refuses the run; fetching fails the attempt, as trouble of the network does."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | setting
    command = [sys.executable, "-c", RESOLVE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    resolving, fetching = done.stdout.splitlines()
    assert resolving.startswith("ModelError cannot get org/model from the model hub")
    assert "vcf-batch model fetch org/model --to URL" in resolving
    assert "HTTPS_PROXY" in resolving and "HF_ENDPOINT" in resolving
    assert fetching.startswith("StorageError cannot get a/b from the model hub")


class FakeHub:
    """Stands in for the network side of ``huggingface_hub``: a repository in a dictionary."""

    files: dict[str, bytes] = FILES
    downloaded: list[str] = []  # noqa: RUF012

    def model_info(self, name: str, revision: str | None = None, files_metadata: bool = False) -> SimpleNamespace:
        siblings = [SimpleNamespace(rfilename=file, size=len(data)) for file, data in self.files.items()]
        return SimpleNamespace(sha={None: "c" * 40, "c" * 40: "c" * 40, "v1": "d" * 40}[revision], siblings=siblings)

    @classmethod
    def hf_hub_download(cls, name: str, file: str, *, revision: str, local_dir: str) -> str:
        if file not in cls.files:
            kind = pytest.importorskip("huggingface_hub").errors.RemoteEntryNotFoundError
            raise kind.__new__(kind)
        cls.downloaded.append(file)
        return os.path.join(write(Path(local_dir), {file: cls.files[file]}), file)

    @classmethod
    def snapshot_download(cls, name: str, *, revision: str, local_dir: str, allow_patterns: list[str]) -> str:
        cls.downloaded += allow_patterns
        return write(Path(local_dir), {file: cls.files[file] for file in allow_patterns})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", FakeHub.snapshot_download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", FakeHub.hf_hub_download)
    monkeypatch.setattr(FakeHub, "downloaded", [])
    return FakeHub


def test_a_hub_id_is_resolved_to_its_commit_and_fetched_once(hub: type[FakeHub]) -> None:
    assert resolve("org/model") == ResolvedModel("org/model", "hub", "org/model", "c" * 40)
    assert resolve("org/model", "v1").identity == "d" * 40
    assert set(hub.downloaded) == {"model_index.json", "unet/config.json"}
    hub.downloaded.clear()
    assert tree(fetch(resolve("org/model"))) == tree(fetch(resolve("org/model"))) == FILES
    assert hub.downloaded.count("unet/diffusion_pytorch_model.safetensors") == 1


def test_hub_models_with_pickles_or_code_are_refused_before_their_weights_are_fetched(
    hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "files", {"config.json": b"{}", "pytorch_model.ckpt": b"x"})
    with pytest.raises(ModelError, match=r"org/model on the Hub has weights only as a pickle, .*: pytorch_model\.ckpt"):
        resolve("org/model")
    monkeypatch.setattr(hub, "files", {"config.json": b'{"auto_map": {}}', "model.safetensors": b"x"})
    with pytest.raises(ModelError, match="org/model on the Hub wants to run code of its own"):
        resolve("org/model")
    assert hub.downloaded == ["config.json"]


def test_a_configuration_is_read_without_the_weights(
    hub: type[FakeHub], model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolution, "tiny_folder", lambda: model_folder)
    for name in ("tiny", model_folder, f"local://{model_folder}", "org/model"):
        resolved = resolve(name)
        assert resolution.read_config(resolved, "unet/config.json") == {"_class_name": "UNet2DConditionModel"}
        assert resolution.read_config(resolved, "judge/config.json") is None
    assert not [file for file in hub.downloaded if file.endswith(".safetensors")]
    Path(model_folder, "unet/config.json").write_bytes(b"[]")
    with pytest.raises(ModelError, match=r"unet/config\.json of the model tiny is not a JSON object"):
        resolution.read_config(ResolvedModel("tiny", "tiny", "tiny", "0"), "unet/config.json")
    Path(model_folder, "unet/config.json").write_bytes(b"{")
    with pytest.raises(ModelError, match=r"unet/config\.json of the model tiny cannot be read"):
        resolution.read_config(ResolvedModel("tiny", "tiny", "tiny", "0"), "unet/config.json")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("GatedRepoError", "org/model is gated: accept its terms on .*/org/model, then set HF_TOKEN"),
        ("RepositoryNotFoundError", "there is no model 'org/model' on"),
        ("RevisionNotFoundError", "org/model has no revision 'v9'"),
    ],
)
def test_refusals_of_the_hub_are_named(
    hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    errors = pytest.importorskip("huggingface_hub").errors

    def refuse(*args: object, **kwargs: object) -> None:
        kind = getattr(errors, name)
        raise kind.__new__(kind)

    monkeypatch.setattr(hub, "model_info", refuse)
    with pytest.raises(ModelError, match=message):
        resolve("org/model", "v9")
    with pytest.raises(ModelError):
        fetch(ResolvedModel("org/model", "hub", "org/model", "v9"))


def test_trouble_of_storage_stays_trouble_of_storage(model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(url: str, path: str) -> None:
        raise StorageError("connection reset")

    resolved = resolve(f"local://{model_folder}")
    monkeypatch.setattr(storage, "download", fail)
    with pytest.raises(StorageError, match="connection reset"):
        fetch(resolved)
