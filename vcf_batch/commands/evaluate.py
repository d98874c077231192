"""Measure the paper's Table 3 on any model: how much each fusion takes from the reference, and what that costs the
prompt (docs/method.md, section 6).

An evaluation is a normal run. :func:`write_manifest` writes a manifest of pairs x seeds x methods, where each row has
its method's settings as overrides. The run generates and scores the rows, and :func:`tabulate` reads its output. All
methods get the same pairs of prompt and reference and the same noise. The method "text only" has strength 0, so its
picture shows the prompt alone; it is compared with the reference like the others.
"""

import io
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from vcf_batch import images, pool, storage
from vcf_batch.config.limits import IP_ADAPTER, MAX_PIXELS, ROLES
from vcf_batch.config.run_config import DECIDED_BY_EVALUATION, RunConfig
from vcf_batch.config.signature import with_settings_of
from vcf_batch.config.strengths import EVALUATED_STRENGTHS, default_strengths
from vcf_batch.errors import RefusedError, UsageError, printable, redact
from vcf_batch.manifest import image_files
from vcf_batch.manifest import prompts as prompt_files
from vcf_batch.metrics.bootstrap import DRAWS, LEVEL, Bootstrap
from vcf_batch.models import adapter_layout, embedded, resolution
from vcf_batch.models.cache import fetch
from vcf_batch.models.parts import REFERENCE_PARTS
from vcf_batch.output import receipts, run_file, shards
from vcf_batch.output.run_file import RunRecord
from vcf_batch.records import Shard
from vcf_batch.report import comparison
from vcf_batch.report.comparison import RELATIVE, TABLE_SCORES, Line
from vcf_batch.setup import default_model, model_check, run_models
from vcf_batch.setup.absolute_paths import absolute
from vcf_batch.setup.run_models import OWN_PROBE

TEXT_ONLY, PNO, SAME = "text only", "concat + PNO", "concat, those of PNO"
"""Three special methods: the baseline; PNO, run on the first samples only because it is slow; and ``concat`` on those
same samples."""

Method = tuple[str, str, float, int | None, str | None]
"""Name, fusion, strength, steps of prompt-noise optimisation, and role."""

Case = tuple[str, str, int]
"""Prompt, reference and seed. All methods sample the same cases."""


@dataclass(frozen=True, repr=False)
class Evaluation:
    """The result of an evaluation. As text, and in a notebook, it is its table."""

    out: str
    """Folder or URL with ``table.md``, ``results.json``, ``tradeoff.png`` and ``tradeoff.svg``."""
    lines: tuple[Line, ...]
    """The methods, each with its scores and their intervals."""
    table: str
    """The Markdown of ``table.md``."""
    results: Mapping[str, Any]
    """The content of ``results.json``."""

    def __str__(self) -> str:
        return self.table

    def __repr__(self) -> str:
        return f"Evaluation({redact(self.out)!r})"

    def _repr_markdown_(self) -> str:
        return self.table


@with_settings_of(RunConfig, DECIDED_BY_EVALUATION)
def evaluate(
    out: str | os.PathLike[str],
    *,
    prompts: str | os.PathLike[str] | Sequence[str] | None = None,
    prompt_column: str | None = None,
    references: str | os.PathLike[str] | None = None,
    pairs: int = 64,
    seeds: int = 1,
    strengths: Collection[float] = EVALUATED_STRENGTHS,
    pno_steps: int = 10,
    pno_samples: int = 16,
    **settings: Any,
) -> Evaluation:
    """Compare text only with each fusion of a model, and with its roles, on the same prompts, references and noise.

    The samples are an ordinary run in the folder ``samples`` of ``out``; the same call again resumes it. It is
    ``vcf-batch model evaluate``.

    Args:
        out: folder or URL for manifest, samples, table and plot.
        prompts: the prompts, or a file of them; each is paired with every reference. Without prompts and references, a
            model of the tiny family gets pairs from its own world.
        prompt_column: the column with the prompts, where ``prompts`` is a table.
        references: folder of reference images.
        pairs: number of pairs from the tiny model's world, without ``prompts``.
        seeds: number of images of each pair by each method.
        strengths: strengths of ``concat``, and of an IP-Adapter, besides their own.
        pno_steps: steps of prompt-noise optimisation, in the method ``concat + PNO``.
        pno_samples: number of samples of that method; 0 leaves it out.
        settings: fields of :class:`RunConfig`, such as ``model``, ``steps`` or ``num_workers``.

    Raises:
        UsageError: a setting, the prompts, the references or the model cannot be used.
        RefusedError: ``out`` holds another evaluation, or another driver is at work there.
        StorageError: the storage failed.
        VcfBatchError: shards or workers failed again and again.
        Interrupted: Ctrl-C or SIGTERM. The same call resumes.
    """
    if decided := sorted(DECIDED_BY_EVALUATION & settings.keys()):
        raise UsageError(f"an evaluation decides {decided[0]} itself: leave it out")
    config = RunConfig.from_mapping({**settings, **places(os.fspath(out)), "pno_steps": 0})
    config = prepared(
        config,
        lambda line: print(printable(line)),
        prompts=os.fspath(prompts) if isinstance(prompts, os.PathLike) else prompts,
        prompt_column=prompt_column,
        references=None if references is None else os.fspath(references),
        pairs=pairs,
        seeds=seeds,
        strengths=strengths,
        pno_steps=pno_steps,
        pno_samples=pno_samples,
    )
    pool.run(config)
    return tabulate(config)


def places(out: str) -> dict[str, str]:
    """Manifest and output of an evaluation, by the names of the settings."""
    return {"manifest": storage.join(out, "manifest.parquet"), "output": storage.join(out, "samples")}


def prepared(
    config: RunConfig,
    tell: Callable[[str], object],
    *,
    prompts: str | Sequence[str] | None,
    prompt_column: str | None,
    references: str | None,
    pairs: int,
    seeds: int,
    strengths: Collection[float],
    pno_steps: int,
    pno_samples: int,
) -> RunConfig:
    """Choose the pairs of an evaluation and write its manifest. For arguments see :func:`evaluate`.

    Args:
        config: configuration of the run, with the :func:`places` of the evaluation.
        tell: called with each line about files that are left out.

    Returns:
        The configuration to run.

    Raises:
        UsageError, RefusedError, StorageError: see :func:`evaluate`.
    """
    for name, value, least in (("pairs", pairs, 1), ("seeds", seeds, 1), ("pno_samples", pno_samples, 0)):
        if not isinstance(value, int) or value < least:
            raise UsageError(f"{name} is {value!r}; it must be a whole number of {least} or more")
    if (prompts is None) != (references is None):
        raise UsageError("give --prompts and --references together, or neither to use the tiny model's own")
    if prompt_column is not None and not isinstance(prompts, str):
        kind = "which is not given" if prompts is None else "which are a list and have none"
        raise UsageError(f"--prompt-column {prompt_column} names a column of --prompts, {kind}")
    chosen: Sequence[Mapping[str, Any]] | int = pairs
    if prompts is not None and references is not None:
        found = image_files.find(references, config.manifest)
        for line in found.told():
            tell(line)
        texts = prompt_files.read(prompts, prompt_column) if isinstance(prompts, str) else prompts
        chosen = crossed(texts, found.uris)
        config = config.replace(reference_root=(*config.reference_root, references))
    return write_manifest(config, chosen, seeds, strengths, pno_steps, pno_samples)


def crossed(prompts: Iterable[str], references: Sequence[str]) -> list[dict[str, Any]]:
    """Combine every prompt with every reference: rows of a manifest. Blank prompts are skipped."""
    lines = [line.strip() for line in prompts if line.strip()]
    return [{"prompt": prompt, "reference": uri} for prompt, uri in itertools.product(lines, references)]


def drawn(count: int) -> list[dict[str, Any]]:
    """Pairs from the tiny family's world: prompt, reference, and the attributes that a picture of both should show."""
    from vcf_batch.tiny import pairs  # Imported here because only one model needs it.

    rows = []
    for number, pair in enumerate(pairs.draw(count)):
        file = io.BytesIO()
        pair.reference.save(file, "png")
        image = {"bytes": file.getvalue(), "path": f"reference-{number:04d}.png"}
        wanted = {name: value for name, value in pair.wanted.items() if name != "direction"}  # A column is a new run.
        rows.append({"prompt": pair.prompt, "reference": image, **wanted})
    return rows


def write_manifest(
    config: RunConfig,
    pairs: Sequence[Mapping[str, Any]] | int,
    seeds: int,
    sweep: Collection[float],
    pno_steps: int = 0,
    pno_samples: int = 0,
) -> RunConfig:
    """Write the manifest that compares the methods.

    Args:
        config: configuration of the run. The manifest is written to its ``manifest``.
        pairs: pairs of prompt and reference, as :func:`crossed` returns them. For a model of the tiny family: the
            number of pairs to take from :func:`drawn`.
        seeds: number of samples of each pair and method.
        sweep: strengths of ``concat`` and of an IP-Adapter in addition to their own strengths.
        pno_steps: steps of prompt-noise optimisation, at the model's own strength.
        pno_samples: number of samples, the first of all, that are optimised.

    Returns:
        The configuration to run.

    Raises:
        UsageError: a strength is out of range, there are no pairs or no perceptual distance, or matplotlib is not
            installed.
        RefusedError: the manifest's place holds the manifest of another evaluation.
        StorageError: the storage failed.
    """
    comparison.require_matplotlib()
    for strength in sweep:
        config.replace(strength=strength)  # Checks the limits of a strength.
    config = absolute(config)
    if not isinstance(pairs, int):
        first = [pair["prompt"] for pair in pairs[: default_model.JUDGED_ROWS]]
        default_model.check(config, run_file.read(config.output), lambda: first)
    resolved = run_models.resolve(config)
    name = config.model or resolved.pipeline.name
    if isinstance(pairs, int):
        if resolution.read_config(resolved.pipeline, f"{OWN_PROBE}/config.json") is None:
            raise UsageError(f"model {name!r} needs --prompts and --references; only 'tiny' brings its own")
        pairs = drawn(pairs)
    if not pairs:
        raise UsageError("there are no prompts: every line is blank")
    if resolved.lpips == "none":
        raise UsageError(
            f"model {name!r} has no perceptual distance of its own to compare pictures with references: name "
            "one with --lpips alex --lpips-weights URL"
        )
    index = resolution.read_config(resolved.pipeline, "model_index.json") or {}
    own = default_strengths(resolution.read_config(resolved.pipeline, "aligner/config.json"), index)
    has_aligner = all(any(index.get(part) or ()) for part in REFERENCE_PARTS)
    if resolved.ip_adapter is not None and resolved.image_encoder is not None:
        unet = resolution.read_config(resolved.pipeline, "unet/config.json") or {}
        adapter_layout.check_files(resolved.ip_adapter, resolved.image_encoder, unet)
        config = config if has_aligner else config.replace(fusion=IP_ADAPTER)

    def swept(name: str, fusion: str) -> list[Method]:
        return [(name, fusion, strength, None, None) for strength in sorted({*sweep, own[fusion]} - {0.0})]

    methods: list[Method] = [(TEXT_ONLY, config.fusion if not has_aligner else "concat", 0.0, None, None)]
    if has_aligner:
        methods += [
            ("naive", "naive", own["naive"], None, None),
            ("cross-attention", "cross_attention", own["cross_attention"], None, None),
            *swept("concat", "concat"),
            *(
                (f"concat, role {role}", "concat", own["concat"], None, role)
                for role in (ROLES[1:] if model_check.stored_roles(resolved.pipeline) else ())
            ),
            (PNO, "concat", own["concat"], pno_steps, None),
        ]
    if resolved.ip_adapter is not None:
        methods += swept("IP-Adapter", IP_ADAPTER)
    cases = [(number * seeds + seed, pair) for number, pair in enumerate(pairs) for seed in range(seeds)]
    rows = [
        {**pair, "seed": seed, "method": name, "fusion": fusion, "strength": strength, "pno_steps": steps}
        | ({"reference_roles": role} if any(each[-1] for each in methods) else {})
        for seed, pair in cases
        for name, fusion, strength, steps, role in methods
        if name != PNO or seed < pno_samples
    ]
    if not has_aligner:
        rows = [{name: value for name, value in row.items() if name != "fusion"} for row in rows]
    _publish(config.manifest, rows)
    return config


def _publish(url: str, rows: list[dict[str, Any]]) -> None:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    try:
        storage.publish_bytes(url, file.getvalue(), create=True)
    except FileExistsError:
        if storage.read_bytes(url) != file.getvalue():
            raise RefusedError(
                f"{url} belongs to an evaluation of other prompts, references, seeds, strengths or "
                "PNO; use another --out, or rerun with those"
            ) from None


def tabulate(config: RunConfig) -> Evaluation:
    """Compare the methods of an evaluation after its run.

    Writes ``table.md``, ``results.json``, ``tradeoff.png`` and ``tradeoff.svg`` beside the run's output.

    Args:
        config: the configuration that :func:`write_manifest` returned.

    Raises:
        UsageError: there is no run, or it has no text-only picture.
        StorageError: the storage failed.
    """
    record = run_file.read(config.output)
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for sample in _samples(config):
        groups.setdefault((sample["method"], sample["strength"]), []).append(sample)
    base = {_case(sample): sample for sample in groups.get((TEXT_ONLY, 0.0), ())}
    if record is None or not base:
        raise UsageError(f"{config.output} has no picture of text only to compare the others with")
    for (method, strength), group in [*groups.items()]:
        if method == PNO and len(group) < len(base):
            cases = {_case(sample) for sample in group}
            groups[SAME, strength] = [
                sample for sample in groups.get(("concat", strength), ()) if _case(sample) in cases
            ]
    comparable = {key: [sample for sample in group if _case(sample) in base] for key, group in groups.items()}
    lines = [_line(method, group, base) for (method, _), group in comparable.items() if group]
    results = {
        "models": record.models,
        "config": record.config,
        "versions": record.versions,
        "interval": {"level": LEVEL, "draws": DRAWS},
        "methods": [asdict(line) for line in lines],
    }
    markdown = f"{_caption(record, base)}\n\n{comparison.tables(lines)}\n"
    files = {f"tradeoff.{kind}": data for kind, data in comparison.plot(lines).items()}
    files |= {"table.md": markdown.encode(), "results.json": json.dumps(results, indent=2).encode()}
    out = storage.parent(config.output)
    for name, data in files.items():
        storage.publish_bytes(storage.join(out, name), data)
    return Evaluation(out, tuple(lines), markdown, results)


def _samples(config: RunConfig) -> Iterator[dict[str, Any]]:
    """Yield the rows of the parquets that have all scores. Rows of the tiny world get a field ``shown`` in addition."""
    for receipt in receipts.read(config.output):
        with shards.open_parquet(shards.file_url(config.output, receipt.shard, "parquet")) as parquet:
            rows = parquet.read().to_pylist()
        rows = [row for row in rows if all(row[name] is not None for name in TABLE_SCORES)]
        if rows and "shape" in rows[0]:
            _add_shown(rows, receipt.shard, config)
        yield from rows


def _add_shown(rows: Sequence[dict[str, Any]], shard: Shard, config: RunConfig) -> None:
    """Add ``shown`` to each row: attribute to whether the probe sees the wanted value in the picture."""
    from vcf_batch.tiny.probe import Probe, agreement  # Imported here because it imports diffusers.
    from vcf_batch.tiny.world import SIZE, compose

    tar = shards.file_url(config.output, shard, "tar")
    files = {sample["__key__"]: sample[config.image_format] for sample in shards.read_samples(tar)}
    pictures = (images.resize(images.decode(files[row["key"]], MAX_PIXELS), SIZE, SIZE) for row in rows)
    pixels = torch.from_numpy(np.stack([images.to_unit(picture) for picture in pictures])).permute(0, 3, 1, 2)
    folder = fetch(resolution.resolve(config.model or resolution.TINY, config.revision))
    probe = Probe.from_pretrained(storage.join(folder, OWN_PROBE), dtype=torch.float32)
    shown = agreement(probe, pixels, compose(rows, seed=0))
    for number, row in enumerate(rows):
        row["shown"] = {name: bool(right[number]) for name, right in shown.items()}


def _case(sample: Mapping[str, Any]) -> Case:
    return sample["prompt"], sample["reference"], sample["seed"]


def _line(method: str, samples: Sequence[Mapping[str, Any]], base: Mapping[Case, Mapping[str, Any]]) -> Line:
    first = samples[0]
    bootstrap = Bootstrap([sample["prompt"] for sample in samples], [sample["reference"] for sample in samples])
    return Line(
        method=method,
        fusion=first["fusion"],
        strength=first["strength"],
        samples=len(samples),
        scores={name: bootstrap.mean([sample[name] for sample in samples]) for name in TABLE_SCORES},
        relative={
            name: bootstrap.ratio([s[name] for s in samples], [base[_case(s)][name] for s in samples])
            for name in RELATIVE
        },
        shown={name: bootstrap.mean([sample["shown"][name] for sample in samples]) for name in first.get("shown", ())},
    )


def _caption(record: RunRecord, cases: Iterable[Case]) -> str:
    prompts, references, seeds = zip(*cases, strict=True)
    used, fields = record.models, record.fields
    embedded_too = f" ({embedded.EMBEDDED})" if embedded.is_embedded(used["model"]) else ""
    return (
        f"Model `{used['model']['name']}`{embedded_too}, {fields['width']}x{fields['height']} pixels, "
        f"{fields['steps']} steps of {fields['scheduler']}, guidance scale {fields['guidance_scale']:g}; "
        f"{len(set(prompts))} prompts, "
        f"{len(set(references))} references, {len(seeds)} samples of each method. CLIP scores by "
        f"`{used['clip_score']['name']}`, LPIPS by `{used['lpips']['name']}`. In brackets: {LEVEL:.0%} intervals."
    )
