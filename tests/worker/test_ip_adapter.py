"""Runs with an IP-Adapter, on a tiny Stable Diffusion 1.5 in its published layout, which has no aligner."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import safetensors.torch
import torch
from click.testing import CliRunner
from diffusers import UNet2DConditionModel

from support import hub_server, ip_adapters, loras, runs, sd_layouts
from support.tiny_models import build_pipeline
from vcf_batch import images
from vcf_batch.cli import main
from vcf_batch.config.limits import MAX_PIXELS
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import ModelError, UsageError
from vcf_batch.models import resolution
from vcf_batch.models.adapters import encoder_beside, resolve_adapter
from vcf_batch.models.cache import CACHE_VARIABLE
from vcf_batch.models.names import ADAPTERS_ID, PRESETS
from vcf_batch.output import run_file
from vcf_batch.output.kept_samples import KeptSamples
from vcf_batch.setup import absolute_paths
from vcf_batch.setup.run_models import DEFAULT_JUDGE
from vcf_batch.vcf.pipeline import VCFPipeline

pytestmark = pytest.mark.usefixtures("restored_torch")

ROWS: dict[str, list[Any]] = {
    "reference": [
        ["reference0.png"],
        ["reference1.png", "reference2.png"],
        [],
        ["reference1.png"],
        ["reference0.png"],
        ["reference2.png", "reference0.png"],
    ],
    "strength": [1.0, 0.6, 1.0, 0.0, 0.4, 0.8],
    "reference_weights": [None, [2.0, 1.0], None, None, None, None],
    "fusion_hi": [1.0, 1.0, 1.0, 1.0, 0.6, 1.0],
    "negative_reference": [None, None, None, None, "reference1.png", None],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Stable Diffusion, a judge, and the repository of the adapters beside it."""
    folder = tmp_path_factory.mktemp("hub")
    sd_layouts.save_sd15(folder / "sd15")
    unet = UNet2DConditionModel.from_pretrained(folder / "sd15" / "unet")
    models = folder / "IP-Adapter" / "models"
    ip_adapters.save_adapter(models / "ip-adapter_sd15.safetensors", unet)
    ip_adapters.save_adapter(models / "ip-adapter-plus_sd15.bin", unet, "plus")
    ip_adapters.save_encoder(models / "image_encoder")
    sd_layouts.save_clip(folder / "judge")
    return folder


def options(model: Path, **changes: Any) -> dict[str, Any]:
    adapter = f"{model / 'IP-Adapter'}:models/ip-adapter_sd15.safetensors"
    given = {"fusion": "ip_adapter", "ip_adapter": adapter, "judge": str(model / "judge"), "lpips": "none"}
    return given | {"steps": 2, "batch_size": 2, "shard_size": 8} | changes


def pictures(output: Path) -> list[Any]:
    """The images of a run's first shard, in [0, 1]."""
    members = runs.Files(output, "00000").members
    return [images.to_unit(images.decode(data, MAX_PIXELS)) for name, data in members if "png" in name]


def test_a_run_without_an_aligner_draws_each_row_in_its_own_way(model: Path, tmp_path: Path) -> None:
    """References, strengths, weights, ranges and negative references by row; the samples do not depend on the batch."""
    manifest = runs.write_manifest(tmp_path / "in", 6, ROWS)
    drawn = {}
    for size in (2, 1):
        output = runs.generate(manifest, tmp_path / f"{size}", model / "sd15", **options(model, batch_size=size))
        drawn[size] = pictures(output)
        rows = runs.rows_of(output)
        assert [row["status"] for row in rows] == ["success"] * 6
        assert {row["fusion"] for row in rows} == {"ip_adapter"} and rows[0]["clip_reference"] is not None
    for together, alone in zip(drawn[2], drawn[1], strict=True):
        assert np.abs(together - alone).max() <= 1 / 255
    identity = runs.settled(manifest, tmp_path / "x", model / "sd15", **options(model)).fields["ip_adapter_id"]
    other = options(model, ip_adapter=str(model / "IP-Adapter" / "models" / "ip-adapter-plus_sd15.bin"))
    assert runs.settled(manifest, tmp_path / "x", model / "sd15", **other).fields["ip_adapter_id"] != identity


def test_a_repaired_row_has_the_bytes_of_an_undisturbed_run(model: Path, tmp_path: Path) -> None:
    manifest = runs.write_manifest(tmp_path / "in", 6, ROWS)
    job = runs.settled(manifest, tmp_path / "out", model / "sd15", **options(model))
    loaded = runs.load(manifest, tmp_path / "out", model / "sd15", **options(model))
    runs.commit(loaded)
    whole = runs.data_files(tmp_path / "out")
    shard = job.shards[0]
    kept = KeptSamples(job.config, job.manifest, shard, bytes([0, 1, 0, 0, 1, 0]))
    runs.commit(loaded, 2, kept)
    assert runs.data_files(tmp_path / "out") == whole


def test_a_run_by_names_has_the_images_of_a_run_by_paths(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--model sd15 --ip-adapter ip-adapter-sd15`` find base, weights and encoder on the Hub, the judge there too."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    manifest = runs.write_manifest(tmp_path / "in", 6, ROWS)
    by_path = pictures(runs.generate(manifest, tmp_path / "paths", model / "sd15", **options(model)))
    with hub_server.running() as hub:
        hub.repositories |= {
            PRESETS["sd15"].base: model / "sd15",
            ADAPTERS_ID: model / "IP-Adapter",
            DEFAULT_JUDGE: model / "judge",
        }
        named = options(model, ip_adapter="ip-adapter-sd15", judge=None)
        job = runs.settled(manifest, tmp_path / "names", Path("sd15"), **named)
        by_name = pictures(runs.generate(manifest, tmp_path / "names", Path("sd15"), **named))
        with pytest.raises(UsageError, match=r"ip_adapter is ip-adapter-sd15, but no row uses it, as fusion is concat"):
            runs.settled(manifest, tmp_path / "x", Path("sd15"), **named | {"fusion": "concat"})
    assert len(by_path) == 6
    np.testing.assert_array_equal(by_name, by_path)
    described = job.models.describe(guided=False)
    assert described["model"] == {
        "name": PRESETS["sd15"].base,
        "identity": hub_server.commit_of(PRESETS["sd15"].base),
    }
    assert described["ip_adapter"]["name"] == "ip-adapter-sd15"


def test_a_run_goes_on_with_the_commits_that_it_has_begun_with(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of model, IP-Adapter, image encoder, LoRA and judge, whatever was committed to the Hub since."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    manifest = runs.write_manifest(tmp_path / "in", 6, ROWS)
    base = VCFPipeline.from_pretrained(str(model / "sd15"))
    loras.save_kohya(tmp_path / "lora" / "a.safetensors", base, loras.updates(base, loras.UNET, seed=1))
    with hub_server.running() as hub:
        hub.repositories |= {
            PRESETS["sd15"].base: model / "sd15",
            ADAPTERS_ID: model / "IP-Adapter",
            DEFAULT_JUDGE: model / "judge",
            "org/lora": tmp_path / "lora",
            "org/encoder": model / "IP-Adapter" / "models" / "image_encoder",
        }
        named = options(
            model,
            ip_adapter="ip-adapter-sd15",
            judge=None,
            lora=["ink=org/lora:a.safetensors:0.5"],
            image_encoder="org/encoder",
        )
        config = absolute_paths.absolute(
            RunConfig(
                manifest=str(manifest),
                output=str(tmp_path / "out"),
                model="sd15",
                gpus_per_worker=0,
                **runs.SIZE,
                **named,
            )
        )
        runs.run_here(config)
        record = run_file.read(str(tmp_path / "out"))
        assert record is not None
        assert record.named_models["lora ink"]["identity"] == f"{hub_server.commit_of('org/lora')}/a.safetensors"
        hub.moved |= hub.repositories.keys()
        assert runs.settle(config, record).fields == record.fields
        newest = runs.settle(config.replace(output=str(tmp_path / "other"))).fields
    changed = {name for name, value in newest.items() if value != record.fields[name]}
    assert changed == {"model_id", "judge_id", "ip_adapter_id", "lora_id"}


def test_fusions_differ_by_row_where_the_model_has_an_aligner(model: Path, tmp_path: Path) -> None:
    """And prompt-noise optimisation follows the reference through either's tokens."""
    folder = runs.save_model(tmp_path / "model")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    ip_adapters.save_adapter(tmp_path / "adapter" / "x.safetensors", unet, "plus")
    ip_adapters.save_encoder(tmp_path / "adapter" / "image_encoder")
    columns: dict[str, list[Any]] = {
        "fusion": ["concat", "ip_adapter", "naive", "ip_adapter"],
        "pno_steps": [0, 0, 1, 1],
    }
    columns["reference"] = ["reference0.png"] * 4
    manifest = runs.write_manifest(tmp_path / "in", 4, columns)
    output = runs.generate(manifest, tmp_path / "out", folder, ip_adapter=str(tmp_path / "adapter"), steps=2)
    rows = runs.rows_of(output)
    assert [row["status"] for row in rows] == ["success"] * 4
    assert [row["fusion"] for row in rows] == columns["fusion"]
    assert len({row["sha256"] for row in rows}) == 4
    assert rows[3]["pno_objective"] is not None
    assert [row["image_tokens"] for row in rows] == ["all", None, "all", None]
    with pytest.raises(UsageError, match="have ip_adapter in the column 'fusion', but no IP-Adapter is named"):
        runs.settled(manifest, tmp_path / "without", folder, steps=2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ip_adapter": None}, UsageError, "fusion is ip_adapter, but no IP-Adapter is named"),
        ({"ip_adapter": None, "fusion": "concat", "image_encoder": "x"}, UsageError, "image_encoder is 'x', which is"),
        ({"fusion": "concat"}, UsageError, "but no row uses it, as fusion is concat: add --fusion ip_adapter"),
        (
            {"fusion": "naive", "ip_adapter": None},
            ModelError,
            "no aligner, which the fusion naive needs, .*: use the published weights of an IP-Adapter",
        ),
        ({"image_tokens": "cls"}, UsageError, "image_tokens is cls, which is about the tokens of an aligner"),
        (
            {"ip_adapter": "h94/IP-Adapter"},
            ModelError,
            "no file and no folder here; for a model on the Hub, name the f",
        ),
        ({"ip_adapter": "{hub}/IP-Adapter"}, ModelError, r"holds 2 files of weights \(.*\); name the one"),
        (
            {"ip_adapter": "{hub}/IP-Adapter:models/x.safetensors"},
            ModelError,
            "no models/x.safetensors; .* has are models/im",
        ),
        (
            {"ip_adapter": "{hub}/sd15/unet/diffusion_pytorch_model.safetensors"},
            ModelError,
            "image_encoder .*--image-enc",
        ),
        ({"image_encoder": "{hub}/nowhere"}, ModelError, "is not a folder here.*; name another with --image-encoder"),
        ({"pno_steps": 1}, ModelError, "no image encoder of its own to guide .*--pno-guide"),
    ],
)
def test_what_cannot_run_is_refused_before_a_worker_starts(
    model: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    manifest = runs.write_manifest(tmp_path / "in", 2)
    told = {name: value.format(hub=model) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(error, match=message):
        runs.settled(manifest, tmp_path / "out", model / "sd15", **options(model, **told))
    assert not (tmp_path / "out").exists()


def test_a_column_of_fusions_decides_whether_an_aligner_is_needed(model: Path, tmp_path: Path) -> None:
    """Rows that all name ip_adapter need none, whatever --fusion says; one that names concat does."""
    columns: dict[str, list[Any]] = {"reference": ["reference0.png"] * 3, "fusion": ["ip_adapter"] * 3}
    manifest = runs.write_manifest(tmp_path / "in", 3, columns)
    given = options(model, fusion="concat")
    output = runs.generate(manifest, tmp_path / "out", model / "sd15", **given)
    assert [row["status"] for row in runs.rows_of(output)] == ["success"] * 3
    mixed = runs.write_manifest(tmp_path / "mixed", 3, columns | {"fusion": ["ip_adapter", "concat", "ip_adapter"]})
    with pytest.raises(ModelError, match="has no aligner, which the fusion concat needs"):
        runs.settled(mixed, tmp_path / "x", model / "sd15", **given)


def wrong_files(folder: Path, unet: UNet2DConditionModel) -> dict[str, tuple[Path, str]]:
    """Files that are no adapters for a UNet, with what is said of each."""
    tensors = safetensors.torch.load_file(ip_adapters.save_adapter(folder / "good.safetensors", unet))
    data = (folder / "good.safetensors").read_bytes()
    wide = UNet2DConditionModel.from_config({**unet.config, "cross_attention_dim": 48})

    def save(name: str, changes: dict[str, torch.Tensor], *without: str) -> Path:
        kept = {each: tensor for each, tensor in tensors.items() if each not in without}
        safetensors.torch.save_file(kept | changes, folder / f"{name}.safetensors")
        return folder / f"{name}.safetensors"

    def write(name: str, content: bytes, ending: str = "safetensors") -> Path:
        (folder / f"{name}.{ending}").write_bytes(content)
        return folder / f"{name}.{ending}"

    return {
        "of another family": (
            ip_adapters.save_adapter(folder / "sd21.safetensors", wide),
            "gives tokens of width 48, but the model's UNet is conditioned on width 24; published ones are for Stable",
        ),
        "for another encoder": (
            save("encoder", {"image_proj.proj.weight": torch.zeros(4 * 24, 20)}),
            f"reads embeddings of width 20, but the image encoder {folder / 'image_encoder'} gives width 24; name the",
        ),
        "for faces": (save("face", {"image_proj.perceiver_resampler.x": torch.zeros(1)}), "is a FaceID adapter"),
        "with LoRA": (save("lora", {"ip_adapter.0.to_q_lora.down": torch.zeros(1)}), "1 that do not belong there"),
        "without a layer": (save("part", {}, "ip_adapter.1.to_k_ip.weight"), "lack 1 tensors, such as 1.to_k_ip"),
        "of another kind": (save("other", {}, *(name for name in tensors if "proj" in name)), "is no IP-Adapter"),
        "cut off": (write("cut", data[:-9]), f"must have {len(data):,} bytes, and it has {len(data) - 9:,}"),
        "cut in its header": (write("header", data[:60]), "is damaged or no safetensors file: it is cut short"),
        "empty": (write("empty", b""), "is damaged or no safetensors file"),
        "a web page": (write("page", b"<!doctype html><html>Sign in</html>"), "as no safetensors file does; it may"),
        "a web page named .bin": (
            write("page", b"<!doctype html>", "bin"),
            "is damaged or no file of PyTorch: it begins",
        ),
        "a pickle": (write("pickle", b"PK\x03\x04" + b"\0" * 99), "is damaged or no safetensors file"),
    }


@pytest.mark.parametrize("place", ["folder", "URL"])
def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``generate`` and ``plan`` tell from the header of the file, with exit code 2, and no Ray starts."""
    monkeypatch.setattr(ray, "init", pytest.fail)
    manifest = runs.write_manifest(tmp_path / "in", 2)
    folder = tmp_path / "adapters"
    ip_adapters.save_encoder(folder / "image_encoder")
    unet = UNet2DConditionModel.from_pretrained(model / "sd15" / "unet")
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options(model).items() if name != "ip_adapter"]
    given += [f"--model={model / 'sd15'}", "--gpus-per-worker=0"]
    for kind, (file, message) in wrong_files(folder, unet).items():
        adapter = str(file) if place == "folder" else file.as_uri().replace("file://", "local://")
        for command in ("generate", "plan"):
            told = [command, str(manifest), str(tmp_path / "out"), *given, f"--ip-adapter={adapter}"]
            result = CliRunner().invoke(main, told)
            assert result.exit_code == 2, (kind, result.output)
            assert message in result.output.replace("local://", ""), (kind, result.output)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["image_encoder", "judge", "pno_guide", "model"])
def test_a_part_that_is_cut_short_is_refused_before_anything_is_written(model: Path, tmp_path: Path, part: str) -> None:
    """The header of each file tells how long it must be."""
    unet = UNet2DConditionModel.from_pretrained(model / "sd15" / "unet")
    ip_adapters.save_adapter(tmp_path / "adapters" / "x.safetensors", unet)
    whole = {
        "image_encoder": ip_adapters.save_encoder(tmp_path / "encoder"),
        "judge": shutil.copytree(model / "judge", tmp_path / "judge"),
        "pno_guide": sd_layouts.save_clip(tmp_path / "guide", width=16),
        "model": shutil.copytree(model / "sd15", tmp_path / "sd15"),
    }
    file = next(iter(sorted(whole[part].rglob("model*.safetensors"))))
    file.write_bytes(file.read_bytes()[:-1])
    given = options(model, ip_adapter=str(tmp_path / "adapters" / "x.safetensors"), pno_steps=1)
    given |= {name: str(folder) for name, folder in whole.items() if name != "model"}
    with pytest.raises(
        ModelError, match=r"model\S*\.safetensors of the model .* is damaged: it must have [\d,]+ bytes,"
    ):
        runs.settled(runs.write_manifest(tmp_path / "in", 2), tmp_path / "out", whole["model"], **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("place", "message"), [("encoder", r"no text tower \(no text_config"), ("nothing", r"has no config\.json")]
)
def test_a_judge_that_cannot_read_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, place: str, message: str
) -> None:
    ip_adapters.save_encoder(tmp_path / "encoder")
    runs.write_files(tmp_path / "nothing", {"model.safetensors": b"x"})
    given = options(model, judge=str(tmp_path / place))
    with pytest.raises(ModelError, match=message):
        runs.settled(runs.write_manifest(tmp_path / "in", 2), tmp_path / "out", model / "sd15", **given)


def test_the_encoder_of_an_adapter_may_guide(model: Path, tmp_path: Path) -> None:
    """As it is published, without preprocessing of its own."""
    manifest = runs.write_manifest(tmp_path / "in", 2, {"reference": ["reference0.png"] * 2})
    guide = str(model / "IP-Adapter" / "models" / "image_encoder")
    output = runs.generate(manifest, tmp_path / "out", model / "sd15", **options(model, pno_steps=1, pno_guide=guide))
    assert [row["status"] for row in runs.rows_of(output)] == ["success"] * 2


def test_a_bin_file_that_is_cut_short_is_damage_and_no_trouble_of_storage(tmp_path: Path) -> None:
    """So the run ends at once, and not after five starts of a worker."""
    pipeline = build_pipeline()
    whole = ip_adapters.save_adapter(tmp_path / "x.bin", pipeline.unet, "plus").read_bytes()
    encoder = ip_adapters.save_encoder(tmp_path / "image_encoder")
    for size in (0, 100, *range(5000, len(whole), 5000), len(whole) - 1):
        (tmp_path / "x.bin").write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"cannot load the IP-Adapter .*x\.bin: ."):
            pipeline.use_ip_adapter(str(tmp_path / "x.bin"), str(encoder))


def test_the_options_of_other_fusions_are_taken(model: Path, tmp_path: Path) -> None:
    """Triplets, gates, DeepCache, another format; and what is regenerated from the output has its bytes."""
    columns = {"reference": ["reference0.png", "reference1.png", "reference2.png"]}
    manifest = runs.write_manifest(tmp_path / "in", 3, columns)
    given = options(model, triplets=True, min_clip_score=-1.0, deep_cache=2, image_format="webp", steps=3)
    output = runs.generate(manifest, tmp_path / "out", model / "sd15", **given)
    rows = runs.rows_of(output)
    assert [row["status"] for row in rows] == ["success"] * 3 and rows[0]["deep_cache"] == 2
    assert all(row["content_alignment"] is not None for row in rows)
    assert len([name for name, _ in runs.Files(output, "00000").members if name.endswith("webp")]) == 9
    result = CliRunner().invoke(main, ["verify", str(output), "--regenerate", "2"])
    assert result.exit_code == 0, result.output
    moved = model.parent / "moved"
    shutil.copytree(model / "IP-Adapter", moved)
    weights = f"{moved}:models/ip-adapter_sd15.safetensors"
    result = CliRunner().invoke(main, ["verify", str(output), "--regenerate", "1", "--ip-adapter", weights])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", ["{hub}/{file}", "local://{hub}/{file}", "local://{hub}:{file}"])
def test_one_file_has_one_identity_by_whatever_name(model: Path, name: str) -> None:
    """By path, by URL, and with a colon before the file."""
    hub, file = model / "IP-Adapter", "models/ip-adapter_sd15.safetensors"
    expected = resolve_adapter(f"{hub}:{file}")
    found = resolve_adapter(name.format(hub=hub, file=file))
    assert found.identity == expected.identity
    assert encoder_beside(found).identity == encoder_beside(expected).identity


@pytest.mark.parametrize("name", ["s3://nowhere/a.safetensors", "https://host:9000/a.bin"])
def test_the_colon_of_a_scheme_or_a_port_is_not_before_a_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(resolution, "resolve", lambda *given, **more: asked.append((given[0], more)))
    resolve_adapter(name)
    assert asked == [(name.rpartition("/")[0], {"within": name.rpartition("/")[2]})]
