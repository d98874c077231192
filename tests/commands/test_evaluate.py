"""An evaluation, end to end on a random model: the same prompts, references and noise for every method."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import UNet2DConditionModel

import vcf_batch
from support import hub_server, ip_adapters, runs, sd_layouts
from vcf_batch import pool
from vcf_batch.cli import main
from vcf_batch.commands import evaluate
from vcf_batch.config.limits import ROLES
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import RefusedError, UsageError
from vcf_batch.models.names import ADAPTERS_ID, PRESETS
from vcf_batch.tiny.probe import HEADS, Probe
from vcf_batch.vcf.roles import projections

PAIRS, SEEDS = 3, 2
METHODS = [("text only", 0.0), ("naive", 0.3), ("cross-attention", 0.3), ("concat", 0.5), ("concat", 1.0)]
PNO = ("concat + PNO", 1.0)
PNO_SIZE = ("--pno-steps", 1, "--pno-samples", 2)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["model", "evaluate", *map(str, arguments)])


def run(model: Path, out: Path, *more: object) -> Result:
    settings = ("--steps", 2, "--height", 32, "--width", 32, "--num-workers", 1, "--address", "local")
    return call(
        "--model",
        model,
        "--out",
        out,
        "--pairs",
        PAIRS,
        "--seeds",
        SEEDS,
        "--strength",
        0.5,
        *PNO_SIZE,
        *settings,
        *more,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that brings a judge and a probe, as the tiny family does."""
    folder = runs.save_model(tmp_path_factory.mktemp("model"))
    Probe(width=8).save_pretrained(folder / "probe")
    return folder


@pytest.fixture(scope="module")
def out(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    result = run(model, folder)
    assert result.exit_code == 0, result.output
    assert (folder / "table.md").read_text() in result.output
    return folder


def case(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["prompt"], row["reference"], row["seed"]


def test_every_method_gets_the_same_prompts_references_and_noise(out: Path) -> None:
    rows = runs.rows_of(out / "samples")
    cases = {case(row) for row in rows}
    assert len(cases) == PAIRS * SEEDS
    assert len(rows) == len(METHODS) * len(cases) + 2
    for method in METHODS:
        assert {case(row) for row in rows if (row["method"], row["strength"]) == method} == cases


def test_text_only_is_compared_with_the_reference_too(out: Path) -> None:
    rows = [row for row in runs.rows_of(out / "samples") if row["method"] == "text only"]
    assert all(row["lpips"] is not None and row["clip_reference"] is not None for row in rows)


def test_the_results_are_the_means_of_the_samples(out: Path) -> None:
    rows, lines = runs.rows_of(out / "samples"), json.loads((out / "results.json").read_text())["methods"]
    assert [(line["method"], line["strength"]) for line in lines] == [*METHODS, PNO, ("concat, those of PNO", 1.0)]
    assert all(share == {"value": 1.0, "low": 1.0, "high": 1.0} for share in lines[0]["relative"].values())
    for line in lines[:-1]:
        own = [row for row in rows if (row["method"], row["strength"]) == (line["method"], line["strength"])]
        for name, interval in line["scores"].items():
            assert interval["value"] == pytest.approx(sum(row[name] for row in own) / len(own))
            assert interval["low"] <= interval["value"] <= interval["high"]
        assert line["shown"].keys() == HEADS.keys()
    assert (out / "tradeoff.svg").read_text().count("</svg>") == 1


def test_pno_is_compared_with_what_it_began_from(out: Path) -> None:
    rows, lines = runs.rows_of(out / "samples"), json.loads((out / "results.json").read_text())["methods"]
    optimised = [row for row in rows if row["method"] == PNO[0]]
    began = [row for row in rows if (row["method"], row["strength"]) == ("concat", 1.0) and row["seed"] < 2]
    assert [row["pno_objective"]["steps"] for row in optimised] == [1, 1]
    assert [case(row) for row in optimised] == [case(row) for row in began]
    assert lines[-1]["samples"] == len(began) == 2
    assert lines[-1]["scores"]["lpips"]["value"] == pytest.approx(sum(row["lpips"] for row in began) / 2)


def test_other_questions_do_not_mix_with_an_evaluation(model: Path, out: Path) -> None:
    before = (out / "manifest.parquet").read_bytes()
    result = run(model, out, "--strength", 0.7)
    assert (result.exit_code, "belongs to an evaluation of other prompts" in result.output) == (4, True)
    assert (out / "manifest.parquet").read_bytes() == before


def test_roles_are_methods_of_a_model_that_has_projections(model: Path, tmp_path: Path) -> None:
    """At the strength of concat. A model without them has the manifest of before."""
    roled = shutil.copytree(model, tmp_path / "model")
    pairs = {name: [(torch.randn(5, 32), torch.randn(5, 32)) for _ in range(9)] for name in ("style", "palette")}
    fitted = {name: projections.fit(pairs, name) for name in pairs}
    (roled / "aligner" / "roles.safetensors").write_bytes(projections.to_bytes(fitted))
    rows = {}
    for name, folder in (("plain", model), ("roled", roled)):
        places = evaluate.places(str(tmp_path / name))
        config = RunConfig.from_mapping({**places, "model": str(folder), "gpus_per_worker": 0})
        evaluate.write_manifest(config, 2, 1, [0.5], 1, 1)
        rows[name] = pq.read_table(places["manifest"]).to_pylist()
    assert not any("reference_roles" in row for row in rows["plain"])
    added = [row for row in rows["roled"] if row.pop("reference_roles")]
    assert [row["method"] for row in added] == [f"concat, role {role}" for role in ROLES[1:]] * 2
    assert {row["strength"] for row in added} == {1.0}
    assert [row for row in rows["roled"] if row not in added] == rows["plain"]


def test_an_ip_adapter_is_a_method_with_and_without_an_aligner(model: Path, tmp_path: Path) -> None:
    """It is compared with the fusions of an aligner, or on a model without one with text only."""
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    ip_adapters.save_adapter(tmp_path / "adapter" / "x.safetensors", unet)
    ip_adapters.save_encoder(tmp_path / "adapter" / "image_encoder")
    plain = shutil.copytree(model, tmp_path / "model")
    index = json.loads((plain / "model_index.json").read_text())
    (plain / "model_index.json").write_text(json.dumps(index | {"aligner": [None, None]}))
    shutil.rmtree(plain / "aligner")
    found = {}
    for name, folder in (("vcf", model), ("plain", plain)):
        config = RunConfig(
            manifest=str(tmp_path / f"{name}.parquet"),
            output=str(tmp_path / name),
            model=str(folder),
            ip_adapter=str(tmp_path / "adapter"),
            steps=2,
            gpus_per_worker=0,
            shard_size=8,
            **runs.SIZE,
        )
        config = evaluate.write_manifest(config, 1, 1, [0.5], 1, 0)
        runs.run_here(config)
        table = evaluate.tabulate(config).table
        lines = json.loads((tmp_path / "results.json").read_text())["methods"]
        found[name] = [(line["method"], line["strength"]) for line in lines]
        assert "IP-Adapter" in table
    adapter = [("IP-Adapter", 0.5), ("IP-Adapter", 1.0)]
    assert found["vcf"] == [*METHODS, *adapter]
    assert found["plain"] == [("text only", 0.0), *adapter]


def test_the_models_of_an_evaluation_may_be_named(tmp_path: Path) -> None:
    """``--model sd15 --ip-adapter ip-adapter-sd15`` compares the adapter with text only, on the base of the preset."""
    sd_layouts.save_sd15(tmp_path / "hub" / "sd15")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "hub" / "sd15" / "unet")
    models = tmp_path / "hub" / "IP-Adapter" / "models"
    ip_adapters.save_adapter(models / "ip-adapter_sd15.safetensors", unet)
    ip_adapters.save_encoder(models / "image_encoder")
    config = RunConfig(
        manifest=str(tmp_path / "manifest.parquet"),
        output=str(tmp_path / "samples"),
        model="sd15",
        ip_adapter="ip-adapter-sd15",
        judge=str(sd_layouts.save_clip(tmp_path / "judge")),
        lpips="alex",
        lpips_weights=str(
            runs.write_files(tmp_path / "lpips", {"alex.pth": b"heads", "alexnet-owt-7be5be79.pth": b"backbone"})
        ),
    )
    with hub_server.running() as hub:
        hub.repositories |= {PRESETS["sd15"].base: tmp_path / "hub" / "sd15", ADAPTERS_ID: models.parent}
        config = evaluate.write_manifest(config, evaluate.crossed(["a cat"], ["a.png"]), seeds=1, sweep=[0.5])
    assert config.fusion == "ip_adapter"
    assert [row["method"] for row in pq.read_table(config.manifest).to_pylist()] == ["text only"] + ["IP-Adapter"] * 2


@pytest.mark.parametrize("wrong", [{"seeds": 0}, {"pairs": 0}, {"pairs": 1.5}, {"pno_samples": -1}], ids=str)
def test_numbers_that_make_no_evaluation_leave_the_folder_as_it_was(tmp_path: Path, wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(UsageError, match=rf"{name} is .*; it must be a whole number of"):
        vcf_batch.evaluate(tmp_path / "out", model="tiny", **wrong)
    assert not (tmp_path / "out").exists()


def test_own_prompts_meet_every_reference(model: Path, tmp_path: Path) -> None:
    config = RunConfig(manifest=str(tmp_path / "manifest.parquet"), output=str(tmp_path / "samples"), model=str(model))
    evaluate.write_manifest(
        config, evaluate.crossed(["a cat ", "", "a dog"], ["a.png", "b.png"]), seeds=2, sweep=[0.0, 1.0]
    )
    rows = pq.read_table(config.manifest).to_pylist()
    assert len(rows) == 2 * 2 * 2 * 4
    assert {(row["prompt"], row["reference"]) for row in rows} == {
        (prompt, reference) for prompt in ("a cat", "a dog") for reference in ("a.png", "b.png")
    }
    assert len({row["seed"] for row in rows}) == 8
    with pytest.raises(RefusedError):
        evaluate.write_manifest(config, evaluate.crossed(["a cat"], ["a.png"]), seeds=2, sweep=[])


def test_own_prompts_without_a_model_are_refused(tmp_path: Path) -> None:
    """As by generate, and before the manifest is written. Prompts that name shapes are those of the embedded model."""
    config = RunConfig(manifest=str(tmp_path / "manifest.parquet"), output=str(tmp_path / "samples"))
    with pytest.raises(UsageError, match="cannot draw 2 of the first 2 prompts, such as 'a cat'"):
        evaluate.write_manifest(config, evaluate.crossed(["a cat"], ["a.png", "b.png"]), seeds=1, sweep=[])
    assert not list(tmp_path.iterdir())
    evaluate.write_manifest(config, evaluate.crossed(["a star"], ["a.png", "b.png"]), seeds=1, sweep=[])
    assert (tmp_path / "manifest.parquet").exists()


def test_the_models_own_strength_is_among_those_of_concat(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text()) | {"default_strength": 0.15}
    (folder / "model_index.json").write_text(json.dumps(index))
    config = RunConfig(manifest=str(tmp_path / "m.parquet"), output=str(tmp_path / "samples"), model=str(folder))
    evaluate.write_manifest(config, 1, seeds=1, sweep=[1.0])
    rows = pq.read_table(config.manifest).to_pylist()
    assert [row["strength"] for row in rows if row["method"] == "concat"] == [0.15, 1.0]


def test_a_model_without_a_world_needs_prompts_and_a_distance(model: Path, tmp_path: Path) -> None:
    bare = runs.save_model(tmp_path / "bare")
    config = RunConfig(manifest=str(tmp_path / "m.parquet"), output=str(tmp_path / "samples"), model=str(bare))
    with pytest.raises(UsageError, match="needs --prompts and --references"):
        evaluate.write_manifest(config, 1, seeds=1, sweep=[])
    with pytest.raises(UsageError, match="--lpips alex"):
        evaluate.write_manifest(config, evaluate.crossed(["a cat"], ["a.png"]), seeds=1, sweep=[])
    with pytest.raises(UsageError, match="no prompts"):
        evaluate.write_manifest(config, [], seeds=1, sweep=[])
    result = call("--model", bare, "--out", tmp_path, "--prompts", "p.txt")
    assert (result.exit_code, "--prompts and --references together" in result.output) == (2, True)


def test_prompts_and_references_are_read_as_a_manifest_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column of a table without its byte order mark, and images by their content; what is skipped is told."""
    (tmp_path / "p.csv").write_bytes("\ufeffcaption\r\na cat\u2028up\r\n".encode())
    (tmp_path / "refs").mkdir()
    for name, data in (("IMG.HEIC", runs.png(0)), ("a.png", b"text")):
        (tmp_path / "refs" / name).write_bytes(data)
    found: list[Any] = []

    def stop(config: RunConfig, pairs: Any, *_: Any) -> None:
        found.extend(pairs)
        raise UsageError("enough")

    monkeypatch.setattr(evaluate, "write_manifest", stop)
    sources = ("--prompts", tmp_path / "p.csv", "--references", tmp_path / "refs")
    result = call("--out", tmp_path, *sources, "--prompt-column", "caption")
    assert result.stderr == "skipped: 1 files (no image): a.png\nError: enough\n"
    assert found == [{"prompt": "a cat\u2028up", "reference": "refs/IMG.HEIC"}]
    result = call("--out", tmp_path, "--prompt-column", "caption")
    assert (result.exit_code, "--prompt-column caption names a column of --prompts" in result.output) == (2, True)


def test_a_strength_out_of_range_is_refused_before_the_run(tmp_path: Path) -> None:
    for strength in (-1, "nan", "inf"):
        result = call("--out", tmp_path, "--strength", strength)
        assert (result.exit_code, "it must be between 0 and" in result.output) == (2, True)


def test_the_job_is_the_command(tmp_path: Path) -> None:
    job = Path(__file__).parents[2] / "jobs" / "evaluate.py"
    result = subprocess.run([sys.executable, job, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "jobs/evaluate.py [OPTIONS]" in result.stdout


def test_an_evaluation_without_samples_is_no_table(model: Path, tmp_path: Path) -> None:
    config = RunConfig(manifest=str(tmp_path / "m.parquet"), output=str(tmp_path / "samples"), model=str(model))
    with pytest.raises(UsageError, match="no picture of text only"):
        evaluate.tabulate(config)


def test_the_evaluation_of_a_finished_run_is_a_document(out: Path, model: Path) -> None:
    """Alone on standard output; nothing is generated again."""
    result = run(model, out, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((out / "results.json").read_text())


def test_python_gets_the_evaluation_of_the_command(
    out: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same pairs, noise and methods, and so the same table; its text is the table too."""
    monkeypatch.setattr(pool, "run", runs.run_here, raising=False)
    settings: dict[str, Any] = {"steps": 2, "gpus_per_worker": 0, "shard_size": 100, **runs.SIZE}
    sizes: dict[str, Any] = {"pairs": PAIRS, "seeds": SEEDS, "strengths": [0.5], "pno_steps": 1, "pno_samples": 2}
    found = vcf_batch.evaluate(tmp_path, model=model, **sizes, **settings)
    assert found.table == str(found) == found._repr_markdown_() == (tmp_path / "table.md").read_text()
    assert found.table == (out / "table.md").read_text() and found.out == str(tmp_path)
    assert {line.method for line in found.lines} >= {"text only", "concat"}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"strength": 0.5}, "an evaluation decides strength itself: leave it out"),
        ({"prompts": ["a"]}, "give --prompts and --references together"),
        ({"prompts": ["a"], "references": "r", "prompt_column": "p"}, "--prompt-column p names a column"),
        ({"stepz": 3}, "unknown setting 'stepz'"),
    ],
)
def test_python_is_told_what_an_evaluation_does_not_take(given: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        vcf_batch.evaluate(tmp_path, **given)
