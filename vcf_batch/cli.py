"""The command line: options become a RunConfig, errors become exit codes. Nothing else happens here."""

import io
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

import vcf_batch
from vcf_batch import config as settings
from vcf_batch import storage
from vcf_batch.config import RunConfig
from vcf_batch.errors import DamageFound, Interrupted, TooManyFailedRows, UsageError, VcfBatchError, printable
from vcf_batch.pairing import PAIRINGS
from vcf_batch.vcf.recipe import TrainingConfig

if TYPE_CHECKING:
    from vcf_batch.verify import Finding

MAX_CONFIG_BYTES = 1 << 20
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


class _Command(click.Command):
    """A command that ends with the exit codes of :mod:`vcf_batch.errors`, and without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Interrupted as stop:
            click.echo("\nStopped. What is finished is kept: rerun the same command to go on.", err=True)
            ctx.exit(stop.exit_code)
        except KeyboardInterrupt:
            click.echo("\nStopped.", err=True)
            ctx.exit(130)
        except VcfBatchError as error:
            self._show(ctx, error, f"Error: {error}")
            ctx.exit(error.exit_code)
        except Exception as error:
            message = " ".join(str(error).split()) or "no message"
            self._show(
                ctx, error, f"Unexpected {type(error).__name__}: {message}\nRerun with --debug for the traceback."
            )
            ctx.exit(1)

    def _show(self, ctx: click.Context, error: Exception, message: str) -> None:
        if ctx.meta.get("vcf_batch.debug"):
            message = "".join(traceback.format_exception(error)) + message
        click.echo(printable(message), err=True)


def _debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    ctx.meta["vcf_batch.debug"] = value


_debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, is_eager=True, callback=_debug, help="Show the traceback of an error."
)


class _CountOrAuto(click.ParamType):
    name = "auto|N"

    def convert(self, value: Any, parameter: click.Parameter | None, ctx: click.Context | None) -> int | None:
        return None if value == "auto" else int(click.INT.convert(value, parameter, ctx))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(vcf_batch.__version__, prog_name="vcf-batch")
def main() -> None:
    """Generate images that follow prompts and reference images, in bulk, on a Ray cluster."""


def _option(name: str, kind: Any, text: str, **extra: Any) -> Callable[[Any], Any]:
    """An option of ``generate``. Its default stays with RunConfig, so that a configuration file can come in between."""
    return click.option(f"--{name}", type=kind, help=text, default=None, **extra)


@main.command(cls=_Command)
@click.argument("manifest", required=False)
@click.argument("output", required=False)
@_option("config", str, "YAML file or URL of settings, by option name. The command line wins over it.", metavar="URL")
@_option(
    "model",
    str,
    "What generates: 'tiny' (embedded, 64 px), a pipeline directory, a Hugging Face Hub id, or a URL such as "
    "s3://bucket/model.  [default: tiny]",
    metavar="MODEL",
)
@_option("revision", str, "Branch, tag or commit of a Hub model. It is resolved to a commit once and recorded.")
@_option(
    "fusion",
    click.Choice(settings.FUSIONS),
    "How the reference joins the prompt: beside it as extra tokens (concat), averaged into it (naive), or attended to "
    "(cross_attention).  [default: concat]",
)
@_option(
    "strength",
    float,
    "Weight of the reference; 0 ignores it.  [default: 1 for concat, 0.3 for the others]",
)
@_option(
    "fusion-lo",
    float,
    "References are used in the part of the schedule from here to --fusion-hi, outside it the prompt alone. 1 is pure "
    "noise: 0.5 to 1 lets a reference decide on the composition, 0 to 0.5 on the details.  [default: 0]",
)
@_option("fusion-hi", float, "See --fusion-lo.  [default: 1]")
@_option(
    "unconditional",
    click.Choice(settings.UNCONDITIONALS),
    "What guidance leads away from, besides the negative prompt, in rows without a negative reference: zeros as in the "
    "paper, or the look of a blank image. negative is zeros, and insists on a column 'negative_reference'.  "
    "[default: zeros]",
)
@_option(
    "image-tokens",
    click.Choice(settings.IMAGE_TOKENS),
    "Which tokens of a reference are used: its patches, the one that sums it up (cls), or all.  [default: as the "
    "aligner was trained]",
)
@_option("steps", int, "Denoising steps.  [default: the model's recommendation]")
@_option("guidance-scale", float, "Classifier-free guidance.  [default: the model's recommendation]")
@_option("scheduler", click.Choice(settings.SCHEDULERS), "Sampler of the denoising steps.  [default: ddim]")
@_option("eta", float, "Share of new noise in each step of ddim, 0 to 1.  [default: 0]")
@_option(
    "pno-steps",
    int,
    "Prompt-noise optimisation: bring each image closer to its reference in so many steps, each of which costs as much "
    "as three to four images.  [default: 0]",
)
@_option(
    "pno-guide",
    str,
    "The CLIP that --pno-steps follows, never the judge: a directory, a Hub id or a URL.  [default: the model's own "
    "image encoder]",
    metavar="MODEL",
)
@_option("pno-lr-conditioning", float, "Learning rate of the fused tokens.  [default: 0.01]")
@_option("pno-lr-noise", float, "Learning rate of the noise.  [default: 0.01]")
@_option("pno-gamma", float, "Weight of what keeps the noise normal.  [default: 0.1]")
@_option("height", int, "Pixels, a multiple of 8.  [default: the model's size]")
@_option("width", int, "Pixels, a multiple of 8.  [default: the model's size]")
@_option(
    "dtype",
    click.Choice(settings.DTYPES),
    "Precision of the model; auto is bfloat16 on GPUs and float32 on CPUs.  [default: auto]",
)
@_option("negative-prompt", str, "What the images should not show.  [default: nothing]")
@_option(
    "batch-size", int, "Images sampled at once. Part of the run's identity, as it can change pixels.  [default: 8]"
)
@_option(
    "shard-size",
    int,
    "Rows in a shard, the unit of retry and resume.  [default: at most ten minutes of one worker and 1,000 rows]",
)
@_option(
    "reference-root",
    str,
    "Folder, bucket or web address that references may live under, besides the manifest's own folder. Repeatable.",
    multiple=True,
    metavar="URL",
)
@_option("max-pixels", int, "A larger reference fails its row before it is decoded.  [default: 64000000]")
@_option(
    "max-failed",
    float,
    "Largest fraction of failed rows, 0 to 1, that still exits with 0; above it the exit code is 3.  [default: 0]",
)
@_option(
    "judge",
    str,
    "The CLIP that scores: a directory, a Hub id or a URL.  [default: the model's own, else CLIP ViT-B/32]",
    metavar="MODEL",
)
@_option(
    "lpips",
    click.Choice(settings.LPIPS_NETWORKS),
    "Network of the perceptual distance to the reference; auto is the model's own, if it has one.  [default: auto]",
)
@_option("lpips-weights", str, "Folder or URL with the published weight files of alex and vgg.", metavar="URL")
@_option("image-format", click.Choice(settings.IMAGE_FORMATS), "webp is lossless and fastest.  [default: png]")
@_option("seed", int, "Rows without a seed derive theirs from this one and their id.  [default: 0]")
@_option("limit", int, "Only the first rows of the manifest.", metavar="ROWS")
@_option(
    "num-workers",
    _CountOrAuto(),
    "Workers at most. auto is one per GPU that the cluster has, else one per --cpus-per-worker CPUs; on a cluster that "
    "adds GPU nodes by itself, name a number.  [default: auto]",
)
@_option(
    "gpus-per-worker",
    float,
    "GPUs reserved for a worker; 0 computes on CPUs. It decides what --dtype auto is. Where an autoscaler is still to "
    "add the first GPU node, give 1.  [default: as the run began, else 1 where the cluster has a GPU now]",
)
@_option("cpus-per-worker", int, "CPUs reserved for a worker, and the threads it computes with.  [default: 1]")
@_option(
    "allow-smaller-batches",
    bool,
    "Where a batch does not fit the GPU's memory even in a fresh process, sample fewer rows at once. The receipt notes "
    "it: such shards may differ in their last bits.",
    is_flag=True,
)
@_option(
    "shard-timeout",
    float,
    "Seconds without any progress after which a worker is taken to hang, and killed; its shard is tried again.  "
    "[default: 600, or what twenty denoising steps of a batch are guessed to take]",
    metavar="SECONDS",
)
@_option(
    "address",
    str,
    "Ray cluster to run on; 'local' starts a new one on this machine.  [default: RAY_ADDRESS, else the cluster that "
    "this runs in or that runs on this machine already, else a new local one]",
    metavar="ADDRESS",
)
@_debug_option
@click.pass_context
def generate(ctx: click.Context, **_: Any) -> None:
    """Generate an image for every row of MANIFEST into OUTPUT.

    MANIFEST is a Parquet file, or a folder of them, with a column 'prompt' and, if wanted, 'reference', 'sample_id',
    'seed' and per-row settings. OUTPUT is a folder or URL; it becomes a WebDataset of images, prompts and scores.

    Rerunning the same command resumes: finished shards are kept, the rest is generated.

    \b
    Exit codes: 0 done; 1 unexpected; 2 wrong option or manifest; 3 done, but more rows failed than --max-failed
    allows; 4 OUTPUT holds another run, or one is at work there; 130 or 143 interrupted.
    """
    _run(_run_config(ctx))


def _run(config: RunConfig, again: Callable[[], Mapping[int, bytes]] = dict) -> None:
    """Generate what is left, and what ``again`` says, and tell what became of it."""
    from vcf_batch import pool  # not at the top: ray is not needed to print a help text or refuse an option

    summary = pool.run(config, again)
    click.echo(str(summary))
    click.echo(f"To look at it: vcf-batch report {shlex.quote(storage.redact(summary.output))}")
    if summary.counts["failed"]:
        click.echo(f"To generate the failed rows again: {_repair_command(summary.output)}")
    if summary.failed_fraction > config.max_failed:
        raise TooManyFailedRows(
            f"{summary.counts['failed']:,} of {summary.rows:,} rows failed, more than --max-failed "
            f"{config.max_failed:g} allows. Their reasons are in the column error_message of {config.output}/*.parquet."
        )


def _repair_command(output: str) -> str:
    return f"vcf-batch repair {shlex.quote(storage.redact(output))}"


def _run_config(ctx: click.Context, **fixed: Any) -> RunConfig:
    """Defaults, overridden by the configuration file, then by the command line, then by the command itself."""
    given = _given(ctx)
    values: dict[str, Any] = {}
    source = given.pop("config", None)
    if source is not None:
        try:
            text = storage.read_bytes(source, limit=MAX_CONFIG_BYTES).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the configuration file {storage.redact(source)}: {error}") from error
        values = settings.load_yaml(text, storage.redact(source))
    values |= given | fixed
    if values.get("num_workers") == "auto":
        values["num_workers"] = None
    return RunConfig.from_mapping(values)


def _given(ctx: click.Context) -> dict[str, Any]:
    """The settings that the command line names."""
    return {
        parameter.name: ctx.params[parameter.name]
        for parameter in generate.params
        if parameter.name in ctx.params and ctx.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    }


@main.command(cls=_Command)
@click.option("--prompts", required=True, metavar="FILE", help="Text file, one prompt a line; empty lines are skipped.")
@click.option("--references", metavar="DIR", help="Folder of reference images. Without it, prompts alone.")
@click.option(
    "--pairing",
    type=click.Choice(PAIRINGS),
    default="cross",
    show_default=True,
    help="Every prompt with every reference (cross), a random sample of these pairs, or a sample in which each prompt "
    "and each reference comes equally often (balanced).",
)
@click.option("--rows", type=click.IntRange(min=1), help="Rows to write.  [default: all combinations]")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Images of each pair.")
@click.option("--pairing-seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of random, balanced.")
@click.option("--out", required=True, metavar="FILE", help="The Parquet manifest to write.")
@_debug_option
def manifest(prompts: str, references: str | None, out: str, **pairing: Any) -> None:
    """Build a manifest: prompts paired with references."""
    from vcf_batch import manifest as manifests  # pyarrow is not needed to print a help text

    images = _images_in(references, out) if references else []
    count = manifests.build(_prompts_in(prompts), images, storage.absolute(out), **pairing)
    click.echo(f"{storage.redact(out)}: {count:,} rows")


def _prompts_in(file: str) -> list[str]:
    """The lines of a text file."""
    try:
        return storage.read_text(file).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read prompts from {storage.redact(file)}: {error}") from error


def _images_in(folder: str, out: str) -> list[str]:
    """The images below a folder, sorted: relative to the manifest's folder where they lie in it, else absolute."""
    folder, base = storage.absolute(folder), storage.parent(storage.absolute(out)).rstrip("/") + "/"
    names = sorted(name for name in storage.list_tree(folder) if name.lower().endswith(IMAGE_SUFFIXES))
    if not names:
        raise UsageError(f"{storage.redact(folder)} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return [storage.join(folder, name).removeprefix(base) for name in names]


@main.command(cls=_Command)
@click.argument("output")
@click.option("--rows", type=click.IntRange(min=1), default=64, show_default=True, help="Samples to show.")
@click.option("--out", metavar="FILE", help="The PNG to write.  [default: contact_sheet.png in OUTPUT]")
@_debug_option
def contact_sheet(output: str, rows: int, out: str | None) -> None:
    """Draw references beside what became of them: the first samples of OUTPUT as one picture."""
    from vcf_batch.report import contact_sheet as sheets  # Pillow and pyarrow are not needed to print a help text

    output = storage.absolute(output)
    target = storage.absolute(out) if out is not None else storage.join(output, "contact_sheet.png")
    picture = io.BytesIO()
    sheets.contact_sheet(output, rows).save(picture, "png")
    storage.publish_bytes(target, picture.getvalue())
    click.echo(storage.redact(target))


SWEEP = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Strengths of ``concat`` that are evaluated; 1 is the paper's."""

_DECIDED = ("manifest", "output", "fusion", "strength", "pno_steps", "seed", "limit")
"""Settings of a run that an evaluation decides."""


@main.command(cls=_Command, params=[option for option in generate.params if option.name not in _DECIDED])
@click.option("--out", required=True, metavar="DIR", help="Folder or URL: manifest, samples, table and plot go there.")
@click.option("--prompts", metavar="FILE", help="Text file, one prompt a line. Each meets every reference.")
@click.option("--references", metavar="DIR", help="Folder of reference images.")
@click.option(
    "--pairs",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Without prompts and references: how many of both to take from the world of the tiny model.",
)
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Images of each combination.")
@click.option(
    "--strength",
    "sweep",
    type=float,
    multiple=True,
    default=SWEEP,
    show_default=True,
    help="Evaluate concat at this strength, besides the model's own. Repeatable.",
)
@click.option("--pno-steps", type=click.IntRange(min=1), default=10, show_default=True, help="Steps of concat + PNO.")
@click.option(
    "--pno-samples",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="Samples of concat + PNO, which takes some 30 times as long as the other methods; 0 leaves it out.",
)
@click.pass_context
def evaluate(
    ctx: click.Context,
    out: str,
    prompts: str | None,
    references: str | None,
    pairs: int,
    seeds: int,
    sweep: tuple[float, ...],
    pno_steps: int,
    pno_samples: int,
    **_: Any,
) -> None:
    """Compare what text only and each fusion make of the same prompts, references and noise.

    The samples are generated by a run like any other, in OUT/samples: rerunning the same command resumes. OUT/table.md
    has the scores with bootstrap intervals, OUT/results.json all figures, OUT/tradeoff.png and .svg the plot.
    """
    if (prompts is None) != (references is None):
        raise UsageError("give --prompts and --references together, or neither to use the tiny model's own")
    files = {"manifest": storage.join(out, "manifest.parquet"), "output": storage.join(out, "samples")}
    config = _run_config(ctx, **files, limit=None, pno_steps=0)
    from vcf_batch.vcf import evaluate as evaluation  # torch is not needed to print a help text

    chosen: Any = pairs
    if prompts is not None and references is not None:
        chosen = evaluation.crossed(_prompts_in(prompts), _images_in(references, config.manifest))
        config = config.replace(reference_root=(*config.reference_root, references))
    config = evaluation.prepare(config, chosen, seeds, sweep, pno_steps, pno_samples)
    _run(config)
    click.echo("\n" + evaluation.tabulate(config))


def _moved_option(name: str) -> Callable[..., Any]:
    """An option for something that a run has used and that is elsewhere now."""
    return click.option(f"--{name}", metavar="URL", help=f"Where the run's {name} is now, if that has moved.")


def _moved(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options for everything that a run has used."""
    for name in ("lpips-weights", "pno-guide", "judge", "model", "manifest"):
        command = _moved_option(name)(command)
    return command


@main.command(cls=_Command)
@click.argument("output")
@click.option("--out", metavar="FILE", help="The HTML file to write.  [default: index.html in OUTPUT]")
@_moved_option("manifest")
@_debug_option
@click.pass_context
def report(ctx: click.Context, output: str, out: str | None, **_: Any) -> None:
    """Write a page to look at OUTPUT with: scores, samples, failures, throughput, configuration.

    It is one HTML file that needs nothing else, and shows the best, the worst and random samples beside their
    references. OUTPUT may be unfinished.

    \b
    Exit codes: 0 written; 1 unexpected; 2 no finished shard there; 5 damage.
    """
    from vcf_batch.outputs import Output  # Pillow and pyarrow are not needed to print a help text
    from vcf_batch.report import page

    opened = Output.open(output, _given(ctx))
    target = storage.absolute(out) if out is not None else storage.join(opened.url, page.NAME)
    storage.publish_bytes(target, page.render(opened).encode())
    click.echo(storage.redact(target))


@main.command(cls=_Command)
@click.argument("output")
@click.option(
    "--license", "licence", metavar="ID", help="As Hugging Face names it, such as cc-by-4.0.  [default: open]"
)
@click.option("--force", is_flag=True, help="Replace a README.md that somebody else wrote or changed.")
@_debug_option
def card(output: str, licence: str | None, force: bool) -> None:
    """Write a dataset card, README.md in OUTPUT, to hand it on with.

    It has the header that Hugging Face reads, columns, scores, models and settings, how to load the dataset, its bias
    and limits. Read and complete it: what the prompts and references are, only you know.

    \b
    Exit codes: 0 written; 1 unexpected; 2 no finished shard there, or a README.md that is not ours; 5 damage.
    """
    from vcf_batch.outputs import Output  # pyarrow is not needed to print a help text
    from vcf_batch.report import card as cards

    click.echo(storage.redact(cards.write(Output.open(output), licence, force)))


@main.command(cls=_Command)
@click.argument("output")
@click.option(
    "--regenerate",
    type=click.IntRange(min=1),
    metavar="N",
    help="Draw so many samples again, on this machine, and compare them with what is there: byte for byte on the same "
    "type of device with the same versions, else within a mean difference of 5 of 255.",
)
@click.option("--regenerate-seed", type=int, default=0, show_default=True, help="Chooses which samples these are.")
@_moved
@_debug_option
@click.pass_context
def verify(ctx: click.Context, output: str, regenerate: int | None, regenerate_seed: int, **_: Any) -> None:
    """Read OUTPUT again, all of it, and tell which shards are damaged or missing, and why.

    Receipts are compared with the files, tars with parquets, parquets with the manifest; every image is decoded.

    \b
    Exit codes: 0 no damage; 1 unexpected; 2 no output there; 4 the model is not the run's; 5 damage.
    """
    from vcf_batch import verify as verification  # pyarrow is not needed to print a help text
    from vcf_batch.outputs import Output

    opened = Output.open(output, _given(ctx))
    _tell(verification.check(opened), output)
    if regenerate is not None:
        from vcf_batch import regenerate as regeneration  # nor torch to read files

        _tell(regeneration.regenerate(opened, regenerate, regenerate_seed), output)
    click.echo(f"{storage.redact(output)}: {opened.plan.num_rows:,} rows in {len(opened.plan):,} shards, no damage")


def _tell(findings: Iterable["Finding"], output: str) -> None:
    damage = 0
    for finding in findings:
        click.echo(str(finding))
        damage += finding.is_damage
    if damage:
        raise DamageFound(f"{output} is damaged. To mend it: {_repair_command(output)}")


_OWN = {"address": None, "num_workers": None, "max_failed": 0.0}
"""What a repair does not take from the run that it repairs."""


@main.command(cls=_Command, params=[option for option in generate.params if option.name in _OWN])
@click.argument("output")
@click.option(
    "--where",
    metavar="SQL",
    default="status = 'failed'",
    show_default=True,
    help="Which rows to generate again: a condition on the columns of the parquets.",
)
@_moved
@_debug_option
@click.pass_context
def repair(ctx: click.Context, output: str, where: str, **_: Any) -> None:
    """Generate again what is damaged or missing in OUTPUT, and the rows that --where selects.

    OUTPUT is read again, as by 'verify'. Damaged and missing shards are generated whole; of the others, the selected
    rows alone: their other samples stay, byte for byte. Keys, shards and settings stay as they are.

    \b
    Exit codes: as 'generate'; 5 where OUTPUT is damaged in a way that generating does not mend.
    """
    from vcf_batch.outputs import Output  # pyarrow and DuckDB are not needed to print a help text
    from vcf_batch.repair import Repair

    opened = Output.open(output, _OWN | _given(ctx))
    needed = Repair(opened, where)
    _run(opened.config, lambda: needed.rows(click.echo))


_POSITIVE = click.FloatRange(min=0, min_open=True)
_COUNT = click.IntRange(min=1)


def _recipe(name: str, kind: Any, text: str, **extra: Any) -> Callable[[Any], Any]:
    """An option of ``train-aligner`` with the default of TrainingConfig."""
    return click.option(f"--{name}", type=kind, help=text, default=getattr(TrainingConfig, name.replace("-", "_")),
                        show_default=True, **extra)  # fmt: skip


@main.command(cls=_Command)
@click.option(
    "--model",
    required=True,
    help="What the aligner is for: sd21, sd15 (presets of base and image encoder), tiny, a pipeline directory, a "
    "Hugging Face Hub id, or a URL.",
)
@click.option(
    "--data",
    required=True,
    metavar="URL",
    help="Captioned images: WebDataset tars or Parquet files. A file, a folder at any depth, or a pattern of file "
    "names in quotes, such as 's3://bucket/train-*.tar'.",
)
@click.option("--out", required=True, metavar="DIR", help="Folder or URL for the aligner, its checkpoints and its log.")
@_recipe("revision", str, "Branch, tag or commit of a Hub model.")
@_recipe("image-encoder", str, "The CLIP that the aligner reads.  [default: the preset's, else the model's own]")
@_recipe("image-encoder-revision", str, "Branch, tag or commit of an image encoder on the Hub.")
@_recipe("image-column", str, "Parquet column of images.  [default: the first struct<bytes, path> or binary one]")
@_recipe("caption-column", str, "Parquet column of captions.  [default: caption, captions, text, sentences, ...]")
@_recipe("limit", _COUNT, "Only the first pairs.", metavar="PAIRS")
@_recipe("validation-data", str, "Captioned images to validate on.  [default: the last pairs of --data]", metavar="URL")
@_recipe("validation-pairs", _COUNT, "Pairs to validate on.  [default: 5 % of the pairs, at most 1,000]")
@_recipe("tokens", click.Choice(("all", "patches", "cls")), "Image tokens that the aligner uses.")
@_recipe("epochs", _COUNT, "Passes over the data.")
@_recipe("batch-size", _COUNT, "Pairs in a step, over all workers; each is compared with all others.")
@_recipe("learning-rate", _POSITIVE, "Of AdamW, at the start; it falls to zero along a cosine.")
@_recipe("weight-decay", click.FloatRange(min=0), "Of AdamW.")
@_recipe("gradient-norm", _POSITIVE, "A longer gradient is shortened to it.")
@_recipe("info-nce-weight", click.FloatRange(min=0), "Lambda, the weight of the contrastive loss.")
@_recipe("temperature", _POSITIVE, "Of the contrastive loss; with --learn-temperature, at the start.")
@_recipe("learn-temperature", None, "Train the temperature too.", is_flag=True)
@_recipe("validate-every", _COUNT, "Steps between validations, each with a checkpoint.  [default: an epoch]")
@_recipe("shuffle-buffer", _COUNT, "Pairs that each worker shuffles at a time.")
@_recipe("seed", click.IntRange(min=0), "Of the first weights, the order and the drawn captions.")
@_recipe(
    "dtype",
    click.Choice(settings.DTYPES),
    "Precision of the frozen towers; auto is bfloat16 on GPUs and float32 on CPUs. With bfloat16 the aligner computes "
    "in mixed precision.",
)
@_recipe(
    "cache-features", str, "Folder or URL that keeps the towers' outputs, for later epochs and runs.", metavar="URL"
)
@_recipe("num-workers", _COUNT, "Workers.  [default: one per GPU, else one per --cpus-per-worker CPUs]")
@_recipe("gpus-per-worker", click.IntRange(0, 1), "0 computes on CPUs.  [default: 1 where there is a GPU, else 0]")
@_recipe("cpus-per-worker", _COUNT, "CPUs reserved for a worker: threads that decode, or compute without a GPU.")
@_recipe("address", str, "Ray cluster; 'local' starts a new one on this machine.  [default: as for generate]")
@_debug_option
def train_aligner(**options: Any) -> None:
    """Train an aligner on captioned images, distributed by Ray Train.

    The default recipe is the paper's. DIR becomes an ImageAligner directory, with log.csv, run.json and checkpoints/
    beside it; 'vcf-batch assemble' makes a model of it. Rerunning the same command resumes.
    """
    from vcf_batch.vcf import train  # torch and ray are not needed to print a help text

    click.echo(str(train.run(TrainingConfig(**options))))


@main.command(cls=_Command)
@click.option(
    "--base", required=True, metavar="ID", help="Stable Diffusion: sd21, sd15, tiny, a directory, Hub id or URL."
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a base on the Hub.")
@click.option(
    "--image-encoder", metavar="ID", help="CLIP of the aligner.  [default: the preset's, else the base's own]"
)
@click.option("--image-encoder-revision", metavar="REV", help="Branch, tag or commit of an image encoder on the Hub.")
@click.option("--aligner", required=True, metavar="DIR", help="What train-aligner wrote: a directory or URL.")
@click.option("--out", required=True, metavar="DIR", help="Folder or URL for the model.")
@click.option(
    "--dtype",
    type=click.Choice(settings.DTYPES[1:]),
    default="float32",
    show_default=True,
    help="Precision of the weights that are written.",
)
@_debug_option
def assemble(
    base: str,
    revision: str | None,
    image_encoder: str | None,
    image_encoder_revision: str | None,
    aligner: str,
    out: str,
    dtype: str,
) -> None:
    """Put Stable Diffusion, image encoder and aligner together as one directory: what generate takes as --model."""
    import torch  # not needed to print a help text

    from vcf_batch.vcf import assembly, parts

    found = parts.Parts.resolve(base, revision, image_encoder, image_encoder_revision)
    assembly.assemble(found, aligner, out, getattr(torch, dtype))
    click.echo(storage.redact(storage.absolute(out)))


if __name__ == "__main__":
    sys.exit(main())
