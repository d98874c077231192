"""Measure how well the method works on the tiny family: ``python benchmarks/evaluation.py --out build/evaluation``.

This gives the tables of docs/evaluation.md. Two UNets, the embedded one and a ``plain`` one that was trained as Stable
Diffusion is, meet four aligners, trained with the paper's loss, with a tether, with captions of looks, and with both,
and three fusions. A third family has never seen some of the references' concepts. References that are sketches,
layouts that no caption names, and photographs come last. All pictures are read by the second probe, which shares no
weights with anything that makes them. The strength of each method is chosen on pairs that are not reported.

Everything made lies in OUT, one file for each step: the same command goes on where it was stopped. It prints an
estimate first. ``table.md`` and ``results.json`` have the results; ``sheets`` has pictures to look at.
"""

import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import evaluation_cases as cases_of
import evaluation_tables as tables
import torch
from evaluation_cases import Cases
from evaluation_tables import FUSIONS, LOOKS_AND_TETHER, Method, Shares, best, share
from PIL import Image
from torch import Tensor

from vcf_batch.config.strengths import EVALUATED_STRENGTHS
from vcf_batch.models.resolution import tiny_folder
from vcf_batch.report.contact_sheet import Cell, grid
from vcf_batch.tiny import pairs, world
from vcf_batch.tiny.families import HELD_OUT_FAMILY
from vcf_batch.tiny.fitting import bfloat16_is_fast, chunks
from vcf_batch.tiny.second_probe import SecondProbe
from vcf_batch.tiny.second_probe import second_probe as load_probe
from vcf_batch.tiny.train import ALIGNERS, OTHER_ALIGNERS, RECIPES
from vcf_batch.training.alignment import recall
from vcf_batch.vcf.aligner import ImageAligner
from vcf_batch.vcf.pipeline import VCFPipeline

STRENGTHS: Mapping[str, Sequence[float]] = {
    "naive": (0.1, 0.2, 0.3, 0.5, 0.7),
    "cross_attention": (0.1, 0.2, 0.3, 0.5, 0.7),
    "concat": EVALUATED_STRENGTHS,
}
"""Strengths that are tried of each fusion. The paper's are 0.3, 0.3 and 1."""
AT_ONCE = 64
"""Pictures of a batch."""
RECALLED = 100
"""Pictures whose captions are looked for."""
SHOWN = 8
"""Pictures of each method that are kept to be looked at."""
STEPS_OF_A_BATCH = 13.0
"""Steps of the UNet's training that take the time of a batch of :data:`AT_ONCE` pictures in 20 steps."""
STEP_COSTS = {
    "probe": 0.3,
    "vae": 1.1,
    "decoder": 0.8,
    "clip": 1.0,
    "vision": 0.8,
    "aligner": 0.1,
    OTHER_ALIGNERS: 0.1,
    "unet": 1.0,
}
"""Time of a step of each stage, relative to one of the UNet's training. They are rough, and serve the estimate."""


@dataclass
class Evaluation:
    """The folder of an evaluation, its settings, and what it has measured."""

    out: Path
    weights: Path
    steps: int
    autocast: bool
    seconds: float = 0.0
    """Wall time of the steps that are done, in this call and in earlier ones."""
    cpu_seconds: float = 0.0
    _pipeline: tuple[str, VCFPipeline] | None = field(default=None, repr=False)

    def measure(self, method: Method, cases: Cases) -> Shares:
        """How often pictures of a method show what is wanted, by its name; generated unless that has been done."""
        file = self.file(method, cases)
        if not file.exists():
            begun = time.perf_counter(), time.process_time()
            made = self.generate(method, cases)
            _strip(made[:SHOWN], file.with_suffix(".png"))
            read = {name: [int(value) for value in right] for name, right in cases.read(made).items()}
            self.record(file, {"method": asdict(method), "right": read}, begun)
        found = self.recorded(file)
        return {name: share(values) for name, values in found["right"].items()}

    def file(self, method: Method, cases: Cases) -> Path:
        """Where a measurement is kept."""
        return self.out / "measured" / cases.name / f"{method.name}.json"

    def record(self, file: Path, found: Mapping[str, Any], begun: tuple[float, float], children: float = 0.0) -> None:
        """Write what a step has found, and the time that it took."""
        wall, cpu = time.perf_counter() - begun[0], time.process_time() - begun[1] + children
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({**found, "seconds": wall, "cpu_seconds": cpu}))
        os.replace(partial, file)

    def recorded(self, file: Path) -> dict[str, Any]:
        """What a step has found. Its time is added to the sums."""
        found: dict[str, Any] = json.loads(file.read_text())
        self.seconds += found["seconds"]
        self.cpu_seconds += found["cpu_seconds"]
        return found

    def generate(self, method: Method, cases: Cases) -> Tensor:
        """Pictures ``[B, 3, 64, 64]`` in [0, 1], whose seeds count from 0."""
        pipeline = self.pipeline(method.family)
        if method.aligner:
            pipeline.aligner = ImageAligner.from_pretrained(self.aligner_folder(method)).eval()

        def batches() -> Iterator[Tensor]:
            for part in chunks(len(cases.prompts), AT_ONCE):
                settings: dict[str, Any] = {"steps": self.steps}
                if method.aligner:
                    settings |= {"fusion": method.fusion, "strength": method.strength}
                references = list(cases.references[part]) if method.aligner else None
                seeds = range(part.start, part.stop)
                yield pipeline.generate(list(cases.prompts[part]), references, seeds=seeds, **settings).float()

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            return torch.cat(list(batches()))

    @torch.no_grad()
    def recall(self, aligner: str) -> float:
        """How often an unseen picture's own caption, worded as in the training, is the nearest of all, 0 to 1."""
        file = self.out / "measured" / "recall" / f"{aligner}.json"
        if not file.exists():
            begun = time.perf_counter(), time.process_time()
            pipeline, named = self.pipeline("embedded"), ALIGNERS[aligner][1]
            scenes = world.sample_scenes(RECALLED, cases_of.RECALL_SEED)
            captions = [world.caption(scenes.named(index), named, None) for index in range(RECALLED)]
            model = ImageAligner.from_pretrained(self.aligner_folder(Method("embedded", aligner, "", 0.0))).eval()
            seen = pipeline.vision_tokens(cases_of.pictures(world.render(scenes)))
            image, text = (tokens.mean(dim=1) for tokens in (model(seen), pipeline.encode_prompts(captions)))
            self.record(file, {"recall": recall(image, text, 1)}, begun)
        found: float = self.recorded(file)["recall"]
        return found

    def pipeline(self, family: str) -> VCFPipeline:
        """The pipeline of a family, loaded once as long as no other one is asked for."""
        if self._pipeline is None or self._pipeline[0] != family:
            folder = self.weights if family == "embedded" else self.out / family / "weights"
            pipeline = VCFPipeline.from_pretrained(folder)
            pipeline.set_progress_bar_config(disable=True)
            self._pipeline = family, pipeline
        return self._pipeline[1]

    def aligner_folder(self, method: Method) -> Path:
        """The aligners of the embedded family are those of the plain one too: they have the same towers."""
        if method.aligner == LOOKS_AND_TETHER:
            return (
                self.out / HELD_OUT_FAMILY.name / "weights" if method.family == HELD_OUT_FAMILY.name else self.weights
            ) / "aligner"
        return self.out / "embedded" / method.aligner

    def train(self, family: str, stage: str, scenes: int, length: float) -> None:
        """Run one stage of a family's training in a process of its own, unless that has been done."""
        file = self.out / family / "done" / f"{stage}.json"
        if not file.exists():
            begun, before = (time.perf_counter(), time.process_time()), _children_seconds()
            command = [sys.executable, "-m", "vcf_batch.tiny.train", "--family", family, "--stage", stage]
            command += ["--out", str(self.out / family), "--scenes", str(scenes), "--length", str(length)]
            command += ["--minutes", "100000"]
            if family != HELD_OUT_FAMILY.name:
                command += ["--parts", str(self.weights)]
            if self.autocast and stage not in ("vae", "decoder"):  # Their details do not survive bfloat16.
                command.append("--autocast")
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
            self.record(file, {}, begun, _children_seconds() - before)
        self.recorded(file)


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _strip(made: Tensor, file: Path) -> None:
    """Write pictures side by side."""
    file.parent.mkdir(parents=True, exist_ok=True)
    cases_of.pictures(torch.cat(list(made), dim=2)[None])[0].save(file)


def stages(families: Sequence[str], aligners: Sequence[str]) -> list[tuple[str, str]]:
    """The training that these families and aligners need: family and stage."""
    wanted = [] if set(aligners) <= {LOOKS_AND_TETHER} else [("embedded", OTHER_ALIGNERS)]
    if "plain" in families:
        wanted += [("plain", stage) for stage in ("unet", "pack")]
    if HELD_OUT_FAMILY.name in families:
        wanted += [(HELD_OUT_FAMILY.name, stage) for stage in HELD_OUT_FAMILY.stages]
    return wanted


def swept(families: Sequence[str], aligners: Sequence[str]) -> list[Method]:
    """The methods whose strengths are tried: every fusion with these aligners of each family."""
    return [
        Method(family, aligner, fusion, strength)
        for family in families
        for aligner in ([LOOKS_AND_TETHER] if family == HELD_OUT_FAMILY.name else aligners)
        for fusion in FUSIONS
        for strength in STRENGTHS[fusion]
    ]


def settle(out: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a new evaluation.

    Raises:
        UsageError: the folder holds an evaluation with others.
    """
    file = out / "settings.json"
    out.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        file.write_text(json.dumps(settings, indent=2))
    there = json.loads(file.read_text())
    changed = [name for name in settings if settings[name] != there.get(name)]
    if changed:
        raise click.UsageError(
            f"{out} holds an evaluation with other settings ({', '.join(changed)}): give those again, or another --out"
        )


def digest(folder: Path) -> str:
    """A hash of all weights in a folder."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        found.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return found.hexdigest()[:16]


def sheet(evaluation: Evaluation, cases: Cases, methods: Sequence[Method], file: Path) -> None:
    """Draw the first references of the cases beside what each method makes of them."""
    columns = [list(cases.references[:SHOWN])]
    for method in methods:
        strip = Image.open(evaluation.file(method, cases).with_suffix(".png"))
        width = strip.height
        columns.append([strip.crop((x, 0, x + width, width)) for x in range(0, strip.width, width)])
    heads = [["reference", ""], *([tables.FUSION_WORDS[method.fusion], method.strength_words] for method in methods)]
    rows = [
        (prompt, [Cell(column[number], "") for column in columns])
        for number, prompt in enumerate(cases.prompts[: len(columns[0])])
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    grid(heads, rows).save(file)


def estimate(evaluation: Evaluation, missing: int, training: Sequence[tuple[str, str]], length: float) -> str:
    """What is left to do, and about how long it takes on this machine as busy as it is: two batches are timed."""
    if missing == 0 and not training:
        return "everything has been measured"
    trial = cases_of.of_the_world("trial", world.sample_scenes(AT_ONCE, pairs.HELD_OUT), SecondProbe())
    taken = []
    for _ in range(2):  # The first one loads libraries.
        begun = time.perf_counter(), time.process_time()
        evaluation.generate(Method("embedded", LOOKS_AND_TETHER, "concat", 0.1), trial)
        taken = [time.perf_counter() - begun[0], time.process_time() - begun[1]]
    factor = 20 / evaluation.steps
    done = 0.0
    for _, stage in training:
        if stage != "pack":
            times = len(ALIGNERS) - 1 if stage == OTHER_ALIGNERS else 1
            recipe = RECIPES["aligner" if stage == OTHER_ALIGNERS else stage]
            done += STEP_COSTS[stage] * recipe.steps * length * times
    batches = missing / AT_ONCE + done / STEPS_OF_A_BATCH * factor
    wall, cpu = (seconds * batches / 3600 for seconds in taken)
    return (
        f"to do: {missing} pictures and {len(training)} stages of training. A batch of {AT_ONCE} pictures takes "
        f"{taken[1]:.1f} s of CPU, {taken[0]:.1f} s on the clock: about {cpu:.1f} hours of CPU, {wall:.1f} on the clock"
    )


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where everything lies.")
@click.option(
    "--weights",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=tiny_folder(),
    show_default="the package's",
    help="Weights of the embedded family.",
)
@click.option("--second-probe", type=click.Path(path_type=Path), help="Trained if absent.  [default: in OUT]")
@click.option(
    "--family",
    "families",
    type=click.Choice(["embedded", "plain", HELD_OUT_FAMILY.name]),
    multiple=True,
    default=["plain", "embedded", HELD_OUT_FAMILY.name],
    show_default=True,
    help="Families to measure; may be repeated.",
)
@click.option(
    "--aligner",
    "aligners",
    type=click.Choice([*ALIGNERS]),
    multiple=True,
    default=[*ALIGNERS],
    show_default="all",
    help="Aligners to measure; may be repeated. 'aligner' is the shipped one.",
)
@click.option("--pairs", "count", type=click.IntRange(min=2), default=256, show_default=True, help="Pairs reported.")
@click.option(
    "--tuning-pairs",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    help="Pairs that strengths are chosen on.",
)
@click.option("--others", type=click.IntRange(min=2), default=64, show_default=True, help="Pairs of each other kind.")
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True, help="Denoising steps.")
@click.option("--scenes", type=click.IntRange(min=1), default=32_000, show_default=True, help="Pictures to train on.")
@click.option("--length", type=float, default=1.0, show_default=True, help="Factor of all training steps.")
@click.option("--photographs", type=click.Path(path_type=Path, exists=True), help="[default: those of scikit-image]")
@click.option(
    "--autocast/--no-autocast",
    default=bfloat16_is_fast(),
    show_default="--autocast where the CPU has AMX",
    help="Compute in bfloat16.",
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--estimate-only", is_flag=True, help="Print the estimate and end.")
def main(
    out: Path,
    weights: Path,
    second_probe: Path | None,
    families: Sequence[str],
    aligners: Sequence[str],
    count: int,
    tuning_pairs: int,
    others: int,
    steps: int,
    scenes: int,
    length: float,
    photographs: Path | None,
    autocast: bool,
    threads: int,
    estimate_only: bool,
) -> None:
    """Measure the method on the tiny family."""
    torch.set_num_threads(threads)
    settings: dict[str, Any] = {"pairs": count, "tuning_pairs": tuning_pairs, "others": others, "steps": steps}
    settings |= {"scenes": scenes, "length": length, "autocast": autocast, "weights": digest(weights)}
    settle(out, settings)
    evaluation = Evaluation(out, weights, steps, autocast)
    probe = load_probe(second_probe or out / "second_probe.safetensors")

    tuning = cases_of.of_the_world("tuning", world.sample_scenes(tuning_pairs, cases_of.TUNING_SEED), probe)
    reported = cases_of.of_the_world("pairs", world.sample_scenes(count, cases_of.REPORTED_SEED), probe)
    further = [
        cases_of.of_sketches(others, probe, shape_named=True),
        cases_of.of_sketches(others, probe, shape_named=False),
        cases_of.of_corners(others, probe),
        cases_of.of_photographs(photographs, probe),
    ]
    concepts = [cases_of.of_concept(kind, others, probe) for kind in ("style", "pattern", "background")]
    both = [family for family in ("plain", "embedded") if family in families]
    groups = [(reported, families), *((each, both) for each in further)]
    groups += [(each, [family for family in families if family != "plain"]) for each in concepts]

    left = [(f, s) for f, s in stages(families, aligners) if not (out / f / "done" / f"{s}.json").exists()]
    missing = sum(
        len(tuning.prompts) for method in swept(families, aligners) if not evaluation.file(method, tuning).exists()
    )
    for cases, shown_for in groups:  # Which strengths will be chosen is not known yet: their files are counted.
        grid_size = sum(len(aligners) if cases is reported and f in both else 1 for f in shown_for)
        wanted = grid_size * len(FUSIONS) + len(shown_for)
        there = len([*(out / "measured" / cases.name).glob("*.json")])
        missing += max(0, wanted - there) * len(cases.prompts)
    click.echo(estimate(evaluation, missing, left, length), err=True)
    if estimate_only:
        return

    for family, stage in stages(families, aligners):
        click.echo(f"training {family}: {stage}", err=True)
        evaluation.train(family, stage, scenes, length)

    found: dict[str, dict[Method, Shares]] = {}

    def measured(cases: Cases, methods: Sequence[Method]) -> dict[Method, Shares]:
        rows = found.setdefault(cases.name, {})
        for method in methods:
            click.echo(f"{cases.name}: {method.name}", err=True)
            rows[method] = evaluation.measure(method, cases)
        return rows

    sweep = measured(tuning, swept(families, aligners))
    chosen = best(sweep)
    for cases, shown_for in groups:
        methods = []
        for family in shown_for:
            methods.append(Method.text_only(family))
            shown = aligners if cases is reported else (LOOKS_AND_TETHER,)
            methods += [m for m in chosen if m.family == family and m.aligner in shown]
        measured(cases, methods)
        for family in shown_for:
            some = [m for m in methods if m.family == family and m.aligner in ("", LOOKS_AND_TETHER)]
            sheet(evaluation, cases, some, out / "sheets" / f"{cases.name} {family}.png")
    perfect = {
        cases.name: {name: share([int(v) for v in right]) for name, right in cases.read(cases.perfect).items()}
        for cases in (tuning, *(cases for cases, _ in groups))
    }
    recalls = {aligner: evaluation.recall(aligner) for aligner in aligners}
    text = tables.report(found, perfect, recalls, settings, (evaluation.seconds, evaluation.cpu_seconds))
    (out / "table.md").write_text(text)
    document = tables.document(found, perfect, recalls, settings)
    (out / "results.json").write_text(json.dumps(document, indent=2))
    click.echo(text)


if __name__ == "__main__":
    main()
