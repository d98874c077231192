"""``generate``, and how the commands that generate besides configure and run it."""

import shlex
from collections.abc import Callable, Mapping
from typing import Any

import click
from click.core import ParameterSource

from vcf_batch import config as settings
from vcf_batch import storage
from vcf_batch.cli.command import Command, debug_option
from vcf_batch.config import RunConfig
from vcf_batch.errors import TooManyFailedRows, UsageError, redact
from vcf_batch.setup.job import TRACE

MAX_CONFIG_BYTES = 1 << 20


class _CountOrAuto(click.ParamType):
    name = "auto|N"

    def convert(self, value: Any, parameter: click.Parameter | None, ctx: click.Context | None) -> int | None:
        return None if value == "auto" else int(click.INT.convert(value, parameter, ctx))


def _option(name: str, kind: Any, text: str, **extra: Any) -> Callable[[Any], Any]:
    """An option of ``generate``. Its default stays with RunConfig, so that a configuration file can come in between."""
    return click.option(f"--{name}", type=kind, help=text, default=None, **extra)


@click.command(cls=Command)
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
@_option(
    "guidance-lo",
    float,
    "Steps are guided in the part of the schedule from here to --guidance-hi; the others take half the time and follow "
    "the prompt less. 1 is pure noise.  [default: 0]",
)
@_option("guidance-hi", float, "See --guidance-lo.  [default: 1]")
@_option(
    "deep-cache",
    int,
    "Compute the deep blocks of the UNet in one step in so many, and reuse what they gave in the others: less time, "
    "other images. Not in rows with prompt-noise optimisation.  [default: 1]",
)
@_option("scheduler", click.Choice(settings.SCHEDULERS), "Sampler of the denoising steps.  [default: ddim]")
@_option("eta", float, "Share of new noise in each step of ddim, 0 to 1.  [default: 0]")
@_option(
    "pno-steps",
    int,
    "Prompt-noise optimisation: bring each image closer to its reference in so many steps, each of which takes three "
    "times the operations of an image.  [default: 0]",
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
@_option(
    "compile",
    bool,
    "Compile the model: a faster UNet and VAE, after minutes for each new shape that no earlier run on the node has "
    "compiled. Part of the run's identity, as it rounds differently.",
    is_flag=True,
)
@_option("negative-prompt", str, "What the images should not show.  [default: nothing]")
@_option(
    "batch-size",
    _CountOrAuto(),
    "Images sampled at once. auto is the fastest number that memory holds, measured on a first worker and kept for all "
    "that resumes the run. Part of the run's identity, as it can change pixels.  [default: 8]",
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
@_option("min-clip-score", float, "Reject samples that fit their prompt less: -1 to 1.  [default: no gate]")
@_option("min-clip-reference", float, "Reject samples that resemble their reference less: -1 to 1.  [default: no gate]")
@_option("max-lpips", float, "Reject samples farther from their reference: 0 or more.  [default: no gate]")
@_option(
    "min-content-alignment",
    float,
    "Reject samples whose layout is less like that of their text-only twin: -1 to 1; with --triplets.  "
    "[default: no gate]",
)
@_option(
    "min-style-similarity", float, "Reject samples less in the style of their reference: 0 to 1.  [default: no gate]"
)
@_option(
    "triplets",
    bool,
    "Write beside each image KEY.content, what the prompt alone makes of the same noise, and KEY.style, the reference. "
    "Each sample takes about twice as long; rows without a reference are rejected.",
    is_flag=True,
)
@_option(
    "safety-checker",
    str,
    "Reject images that it flags as not safe for work: 'own', the model's, or a directory, a Hub id or a URL.  "
    "[default: none]",
    metavar="MODEL",
)
@_option("attempts", int, "Images that a row gets at most, of different seeds, until one passes.  [default: 1]")
@_option(
    "best-by",
    click.Choice(tuple(settings.GATES.values())),
    "Which attempt at a row is recorded if none passes.  [default: clip_score]",
)
@_option("image-format", click.Choice(settings.IMAGE_FORMATS), "webp is lossless and fastest.  [default: png]")
@_option(
    "mark/--no-mark",
    bool,
    "Write into each image, as XMP, that it is synthetic, and its key, model, seed and settings; neither prompt nor "
    "reference.  [default: mark]",
)
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
    "profile",
    bool,
    "Record where the time of one shard's first batches goes: OUTPUT/profile/trace.json, for ui.perfetto.dev.",
    is_flag=True,
)
@_option(
    "stall-timeout",
    float,
    "Seconds without a sign of life after which a worker is taken to hang, and killed; its shard is tried again. Each "
    "denoising step is a sign, each reference, each sample that is written and each part of a file that is staged: no "
    "shard is limited as a whole. Loading the models gives no sign, and may take an hour, or this if it is more.  "
    "[default: 600, 3600 with --compile; or what twenty denoising steps of a batch are guessed to take]",
    metavar="SECONDS",
)
@_option(
    "log-format",
    click.Choice(settings.LOG_FORMATS),
    "What the run tells on standard error: lines for people, or a JSON object a line, with one for each finished shard "
    "besides.  [default: text]",
)
@_option(
    "address",
    str,
    "Ray cluster to run on; 'local' starts a new one on this machine.  [default: RAY_ADDRESS, else the cluster that "
    "this runs in or that runs on this machine already, else a new local one]",
    metavar="ADDRESS",
)
@click.option(
    "--push",
    metavar="URL",
    help="After a run that succeeds, copy OUTPUT to another storage, as 'vcf-batch push' does.",
)
@debug_option
@click.pass_context
def generate(ctx: click.Context, push: str | None, **_: Any) -> None:
    """Generate an image for every row of MANIFEST into OUTPUT.

    MANIFEST is a Parquet file, or a folder of them, with a column 'prompt' and, if wanted, 'reference', 'sample_id',
    'seed' and per-row settings. OUTPUT is a folder or URL; it becomes a WebDataset of images, prompts and scores.

    Rerunning the same command resumes: finished shards are kept, the rest is generated.

    \b
    Exit codes: 0 done; 1 unexpected; 2 wrong option or manifest; 3 done, but more rows failed than --max-failed
    allows; 4 OUTPUT holds another run, or one is at work there; 130 or 143 interrupted.
    """
    config = run_config(ctx)
    run(config)
    if push is not None:
        hand_on(config.output, push)


def run(config: RunConfig, choose_redo: Callable[[], Mapping[int, bytes]] = dict) -> None:
    """Generate what is left and what ``choose_redo`` names, and tell what became of it."""
    from vcf_batch import pool  # not at the top: ray is not needed to print a help text or refuse an option

    summary = pool.run(config, choose_redo)
    click.echo(str(summary))
    click.echo(f"To look at it: vcf-batch report {shlex.quote(redact(summary.output))}")
    if config.profile and summary.resumed_rows < summary.rows:
        trace = storage.join(summary.output, TRACE)
        click.echo(f"To see where the time of a shard goes, open in https://ui.perfetto.dev: {redact(trace)}")
    if summary.counts["failed"]:
        click.echo(f"To generate the failed rows again: {repair_command(summary.output)}")
    if summary.failed_fraction > config.max_failed:
        raise TooManyFailedRows(
            f"{summary.counts['failed']:,} of {summary.rows:,} rows failed, more than --max-failed "
            f"{config.max_failed:g} allows. Their reasons are in the column error_message of {config.output}/*.parquet."
        )


def hand_on(output: str, target: str) -> None:
    """Copy an output to another storage, and tell what was copied."""
    from vcf_batch.commands.push import push
    from vcf_batch.output.output import Output  # pyarrow is not needed to print a help text

    copied, there = push(Output.open(output), target)
    click.echo(f"{redact(target)}: {copied:,} shards copied, {there:,} were there")


def repair_command(output: str) -> str:
    return f"vcf-batch repair {shlex.quote(redact(output))}"


def run_config(ctx: click.Context, **fixed: Any) -> RunConfig:
    """Defaults, overridden by the configuration file, then by the command line, then by the command itself."""
    named = given(ctx)
    values: dict[str, Any] = {}
    named.pop("push", None)
    source = named.pop("config", None)
    if source is not None:
        try:
            text = storage.read_bytes(source, limit=MAX_CONFIG_BYTES).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the configuration file {source}: {error}") from error
        values = settings.load_yaml(text, redact(source))
    values |= named | fixed
    for name in ("num_workers", "batch_size"):
        if values.get(name) == "auto":
            values[name] = None
    return RunConfig.from_mapping(values)


def given(ctx: click.Context) -> dict[str, Any]:
    """The settings of a run that the command line names, rather than leaves to their defaults."""
    return {
        parameter.name: ctx.params[parameter.name]
        for parameter in generate.params
        if parameter.name in ctx.params and ctx.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    }
