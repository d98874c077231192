"""``generate``: the options of a run, which the commands that plan or generate besides take over."""

import re
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import click

from vcf_batch.cli import settings_file
from vcf_batch.cli.command import Command, debug_option, json_option, run, run_config
from vcf_batch.cli.documents import DOCUMENTS
from vcf_batch.cli.option_groups import OPTION_GROUPS
from vcf_batch.config import limits


class _CountOrAuto(click.ParamType):
    name = "auto|N"

    def convert(self, value: Any, parameter: click.Parameter | None, ctx: click.Context | None) -> int | None:
        return None if value == "auto" else int(click.INT.convert(value, parameter, ctx))


class _Deadline(click.ParamType):
    """A date and time, or how long from now; as seconds since 1970."""

    name = "time"

    def convert(self, value: Any, parameter: click.Parameter | None, ctx: click.Context | None) -> float:
        if (span := re.fullmatch(r"(?=\d)(?:(\d{1,5})h)?(?:(\d{1,5})m)?", str(value))) is not None:
            return time.time() + 3600 * int(span[1] or 0) + 60 * int(span[2] or 0)
        try:
            return datetime.fromisoformat(str(value)).timestamp()
        except (ValueError, OverflowError, OSError):
            self.fail(f"{value!r} is no time: give one such as 2026-12-01T06:00, or how long from now, such as 7h30m")


class _NumberOrShare(click.ParamType):
    name = "number|far=share"

    def convert(self, value: Any, parameter: click.Parameter | None, ctx: click.Context | None) -> float | str:
        return value if str(value).startswith("far=") else float(click.FLOAT.convert(value, parameter, ctx))


def _option(name: str, kind: Any, text: str, **extra: Any) -> Callable[[Any], Any]:
    """An option of ``generate``. Its default stays with RunConfig, so that a configuration file can come in between."""
    return click.option(f"--{name}", type=kind, help=text, default=None, **extra)


@click.command(
    cls=Command,
    document=DOCUMENTS["generate"],
    groups=OPTION_GROUPS,
    examples=(
        ("vcf-batch generate demo out/demo", "The demo, with the embedded model"),
        (
            "vcf-batch generate s3://bucket/manifest.parquet s3://bucket/dataset --model s3://bucket/model "
            "--num-workers 64 --max-failed 0.01",
            "A model of yours on a cluster",
        ),
        ("vcf-batch generate --config out/demo/run.json", "The same run again, or the rest of it"),
    ),
)
@click.argument("manifest", required=False)
@click.argument("output", required=False)
@_option(
    "config",
    str,
    "YAML file or URL with settings, named like the options; or the run.json of an output. Options on the command line "
    "win over it.",
    metavar="URL",
)
@click.option(
    "--dump-config", is_flag=True, help="Print every setting as YAML for --config, and end without generating."
)
@_option(
    "model",
    str,
    "The model that generates: a pipeline directory, a Stable Diffusion in one .safetensors file, a Hugging Face Hub "
    "id, a URL such as s3://bucket/model, with --fusion ip_adapter also 'sd15' or 'sdxl', or 'tiny', an embedded test "
    "model that draws ten shapes at 64 px.  "
    "[default: tiny if it can draw most of the first 1,000 prompts; else none, and the run is refused]",
    metavar="MODEL",
)
@_option("revision", str, "Branch, tag or commit of a Hub model. The run records the commit that it stands for.")
@_option(
    "fusion",
    click.Choice(limits.FUSIONS),
    "How the reference joins the prompt: beside it as extra tokens (concat), averaged into it (naive), attended to "
    "(cross_attention), or by the published weights of an IP-Adapter (ip_adapter).  [default: concat]",
)
@_option(
    "ip-adapter",
    str,
    "Weights of an IP-Adapter for --fusion ip_adapter: a name that 'vcf-batch model list' has, such as "
    "ip-adapter-sd15; a file; or a Hub id, folder or URL with ':' and the file in it, such as "
    "h94/IP-Adapter:models/ip-adapter_sd15.safetensors.",
    metavar="WEIGHTS",
)
@_option(
    "image-encoder",
    str,
    "The CLIP that the IP-Adapter was trained with: a directory, a Hub id or a URL.  [default: the folder "
    "'image_encoder' beside the weights]",
    metavar="MODEL",
)
@_option(
    "lora",
    str,
    "A LoRA for all rows that name none in the column 'lora': a name for it, and a .safetensors file as kohya's "
    "sd-scripts or diffusers write it, at a path, at a URL, or on the Hub as org/model:FILE, with its scale. "
    "Repeatable; several apply at once. Rows may name them, too.  [default scale: 1]",
    metavar="NAME=URL[:SCALE]",
    multiple=True,
)
@_option(
    "strength",
    float,
    "Weight of the reference; 0 ignores it. A given weight applies to every fusion.  [default: the model's "
    "recommendation for concat, else 1; 1 for ip_adapter, 0.3 for the other fusions]",
)
@_option(
    "fusion-lo",
    float,
    "Lower end of the part of the schedule that uses references; the rest follows the prompt alone. The schedule runs "
    "from 1 (pure noise) to 0. A reference used from 1 to 0.5 decides on the composition, from 0.5 to 0 on the "
    "details.  [default: 0]",
)
@_option("fusion-hi", float, "Upper end of the part of the schedule that uses references.  [default: 1]")
@_option(
    "role",
    click.Choice(limits.ROLES),
    "What references decide on, in rows without roles of their own: everything, the style, the palette or the layout "
    "alone. The column reference_roles has one for each reference.  [default: all]",
)
@_option(
    "unconditional",
    click.Choice(limits.UNCONDITIONALS),
    "What guidance leads away from besides the negative prompt, in rows without a negative reference: zeros, as in the "
    "paper, or the tokens of a blank image. 'negative' is zeros and requires a column 'negative_reference'.  "
    "[default: zeros]",
)
@_option(
    "image-tokens",
    click.Choice(limits.IMAGE_TOKENS),
    "Which tokens of a reference to use: its patches, the one that sums it up (cls), or all.  [default: those that the "
    "aligner was trained on]",
)
@_option("steps", int, "Denoising steps.  [default: the model's recommendation]")
@_option("guidance-scale", float, "Scale of classifier-free guidance.  [default: the model's recommendation]")
@_option(
    "guidance-lo",
    float,
    "Lower end of the part of the schedule that is guided. The schedule runs from 1 (pure noise) to 0. Steps without "
    "guidance take half the time and follow the prompt less.  [default: 0]",
)
@_option("guidance-hi", float, "Upper end of the part of the schedule that is guided.  [default: 1]")
@_option(
    "deep-cache",
    int,
    "Compute the UNet's deep blocks only in every Nth step and reuse their output in between. 1 computes them in every "
    "step. A larger N takes less time and changes the images. Rows with prompt-noise optimisation ignore it.  "
    "[default: 1]",
    metavar="N",
)
@_option("scheduler", click.Choice(limits.SCHEDULERS), "Sampler of the denoising steps.  [default: ddim]")
@_option("eta", float, "Share of new noise in each step of the scheduler ddim, 0 to 1.  [default: 0]")
@_option(
    "pno-steps",
    int,
    "Bring each image closer to its reference in N steps of prompt-noise optimisation. Each step takes as many "
    "operations as three images.  [default: 0]",
    metavar="N",
)
@_option(
    "pno-guide",
    str,
    "The CLIP that prompt-noise optimisation follows: a directory, a Hub id or a URL. It must not be the judge.  "
    "[default: the model's own image encoder]",
    metavar="MODEL",
)
@_option(
    "pno-lr-conditioning", float, "Learning rate of prompt-noise optimisation for the fused tokens.  [default: 0.01]"
)
@_option("pno-lr-noise", float, "Learning rate of prompt-noise optimisation for the noise.  [default: 0.01]")
@_option(
    "pno-gamma",
    float,
    "Weight of the term of prompt-noise optimisation that keeps the noise normally distributed.  [default: 0.1]",
)
@_option("height", int, "Height in pixels, a multiple of 8.  [default: the model's size]")
@_option("width", int, "Width in pixels, a multiple of 8.  [default: the model's size]")
@_option(
    "original-height",
    int,
    "Height before any cropping, in pixels, as a Stable Diffusion XL is told. Small sizes make blurred images.  "
    "[default: the height]",
)
@_option("original-width", int, "Width before any cropping, as a Stable Diffusion XL is told.  [default: the width]")
@_option("crop-top", int, "Pixels cut off at the top, as a Stable Diffusion XL is told.  [default: 0]")
@_option("crop-left", int, "Pixels cut off at the left, as a Stable Diffusion XL is told.  [default: 0]")
@_option("target-height", int, "Height that is meant, as a Stable Diffusion XL is told.  [default: the height]")
@_option("target-width", int, "Width that is meant, as a Stable Diffusion XL is told.  [default: the width]")
@_option(
    "dtype",
    click.Choice(limits.DTYPES),
    "Precision of the model; auto is bfloat16 on GPUs and float32 on CPUs.  [default: auto]",
)
@_option(
    "compile",
    bool,
    "Compile the UNet and the VAE, which makes them faster. Each new shape takes minutes to compile, once on each "
    "node. Compiled models round differently, so the option is part of the run's identity.",
    is_flag=True,
)
@_option("negative-prompt", str, "What the images should not show.  [default: nothing]")
@_option(
    "batch-size",
    _CountOrAuto(),
    "Number of images sampled at once. 'auto' is the fastest number that the memory holds: the first worker measures "
    "it, and it is kept whenever the run resumes. Part of the run's identity, as it can change pixels.  [default: 8]",
)
@_option(
    "shard-size",
    int,
    "Number of rows in a shard, the unit of retry and resume.  [default: at most ten minutes of one worker and 1,000 "
    "rows]",
)
@_option(
    "reference-root",
    str,
    "Folder, bucket or web address in which references may lie, besides the manifest's own folder. Repeatable.",
    multiple=True,
    metavar="URL",
)
@_option(
    "max-pixels",
    int,
    "Largest number of pixels of a reference. The row of a larger one fails before it is decoded.  [default: 64000000]",
)
@_option(
    "max-failed",
    float,
    "Largest fraction of failed rows, 0 to 1, with which the command still exits with 0. With more it exits with 3.  "
    "[default: 0]",
)
@_option(
    "judge",
    str,
    "The CLIP that scores: a directory, a Hub id or a URL.  [default: the model's own, else CLIP ViT-B/32]",
    metavar="MODEL",
)
@_option(
    "lpips",
    click.Choice(limits.LPIPS_NETWORKS),
    "Network of the perceptual distance to the reference. 'auto' is the model's own, if it has one.  [default: auto]",
)
@_option(
    "lpips-weights", str, "Folder or URL with the published weight files of the networks alex and vgg.", metavar="URL"
)
@_option(
    "min-clip-score",
    _NumberOrShare(),
    "Reject samples with a lower clip_score, their likeness to the prompt: -1 to 1.  [default: no gate]",
)
@_option(
    "min-clip-reference",
    _NumberOrShare(),
    "Reject samples with a lower clip_reference, their likeness to the reference: -1 to 1.  [default: no gate]",
)
@_option(
    "max-lpips",
    _NumberOrShare(),
    "Reject samples with a higher lpips, their distance from the reference: 0 or more.  [default: no gate]",
)
@_option(
    "min-content-alignment",
    _NumberOrShare(),
    "Reject samples with a lower content_alignment, the likeness of their layout to that of their text-only twin: "
    "-1 to 1. Needs --triplets.  [default: no gate]",
)
@_option(
    "min-style-similarity",
    _NumberOrShare(),
    "Reject samples with a lower style_similarity, the likeness of their palette and look to the reference's: 0 to 1.  "
    "[default: no gate]",
)
@_option(
    "calibration",
    str,
    "File that 'vcf-batch score OUTPUT --calibrate' has written, for gates such as --min-clip-reference far=0.05: the "
    "limit that 5 % of the images would keep that share nothing with what they are compared with. Shares are 0.01, "
    "0.05 and 0.1. The number is settled before the run, and part of its identity.",
    metavar="URL",
)
@_option(
    "texture",
    bool,
    "Also measure texture_similarity, how alike image and reference are drawn, whatever their colours, in a column of "
    "its own.",
    is_flag=True,
)
@_option(
    "triplets",
    bool,
    "Write two more images beside each image: KEY.content, drawn from the same noise by the prompt alone, and "
    "KEY.style, the reference. A sample takes about twice as long. Rows without a reference are rejected.",
    is_flag=True,
)
@_option(
    "safety-checker",
    str,
    "Reject images that this checker flags as not safe for work: 'own' is the model's; else a directory, a Hub id or a "
    "URL.  [default: none]",
    metavar="MODEL",
)
@_option(
    "attempts",
    int,
    "Draw up to N images for a row, each from another seed, until one passes all gates.  [default: 1]",
    metavar="N",
)
@_option(
    "best-by",
    click.Choice(tuple(limits.GATES.values())),
    "The score that chooses which of a row's images is recorded if none passes.  [default: clip_score]",
)
@_option(
    "long-prompts",
    click.Choice(limits.LONG_PROMPTS),
    "What to do with a prompt or negative prompt of more tokens than the text encoder takes, 77 for Stable Diffusion: "
    "truncate cuts off the rest and marks the row, refuse fails the row, chunk encodes the text in windows of that "
    "length.  [default: truncate]",
)
@_option(
    "image-format",
    click.Choice(limits.IMAGE_FORMATS),
    "File format of the images. webp is lossless, and the fastest.  [default: png]",
)
@_option(
    "mark/--no-mark",
    bool,
    "Write into each image, as XMP, that it is synthetic, with its key, model, seed and settings. The mark holds "
    "neither prompt nor reference.  [default: mark]",
)
@_option(
    "seed", int, "Seed of the run. A row without a seed of its own derives one from it and its sample_id.  [default: 0]"
)
@_option(
    "limit",
    int,
    "Use only the first ROWS rows of the manifest. If it has no more, this changes nothing.",
    metavar="ROWS",
)
@_option(
    "rows",
    str,
    "Use only the rows of the manifest from number A to B - 1; the first one is 0. Keys and seeds are those of the "
    "whole manifest. So several clusters can each generate a part into an output of its own, and 'vcf-batch export' "
    "makes one dataset of them. 0:B is --limit B.",
    metavar="A:B",
)
@_option("prompt-column", str, "Column of MANIFEST to read as 'prompt'.  [default: prompt]", metavar="NAME")
@_option("reference-column", str, "Column of MANIFEST to read as 'reference'.  [default: reference]", metavar="NAME")
@_option("id-column", str, "Column of MANIFEST to read as 'sample_id'.  [default: sample_id]", metavar="NAME")
@_option("seed-column", str, "Column of MANIFEST to read as 'seed'.  [default: seed]", metavar="NAME")
@_option(
    "carry",
    str,
    "Column of MANIFEST to carry through to the outputs. Without this, a column is refused whose name looks like that "
    "of a column that is read, such as 'Negative-Prompt', or 'image' where there is no 'reference'. Repeatable.",
    multiple=True,
    metavar="NAME",
)
@_option(
    "num-workers",
    _CountOrAuto(),
    "Largest number of workers. 'auto' is one for each GPU that the cluster has, or without GPUs, one for each "
    "--cpus-per-worker CPUs. On a cluster that adds GPU nodes by itself, give a number.  [default: auto]",
)
@_option(
    "gpus-per-worker",
    float,
    "GPUs reserved for each worker; 0 computes on CPUs. It also decides what --dtype auto is. Give 1 where an "
    "autoscaler has not added the first GPU node yet.  [default: as the run began, else 1 if the cluster has a GPU "
    "now, else 0]",
)
@_option(
    "cpus-per-worker", int, "CPUs reserved for each worker, and the number of threads it computes with.  [default: 1]"
)
@_option(
    "one-device-type",
    bool,
    "Use workers of one device type only, so that all bytes are those of one device: the type with the most rows in "
    "OUTPUT, else that of the first worker that loads. Devices and nodes of other types are not used; a run that has "
    "no other node waits for one.",
    is_flag=True,
)
@_option(
    "allow-smaller-batches",
    bool,
    "If a batch does not fit the GPU's memory even in a fresh process, sample fewer rows at once. The images of such a "
    "shard may differ in their last bits; its receipt says so.",
    is_flag=True,
)
@_option(
    "profile",
    bool,
    "Record where the time goes in the first batches of one shard, as OUTPUT/profile/trace.json for ui.perfetto.dev.",
    is_flag=True,
)
@_option(
    "stall-timeout",
    float,
    "Kill a worker that gives no heartbeat for SECONDS, and try its shard again. A worker gives one after each "
    "denoising step, each reference it reads, each sample it writes and each part of a file it stages, so the whole "
    "shard has no time limit. Loading the models gives none and may take an hour, or SECONDS if that is more.  "
    "[default: 600, or 3600 with --compile; more where twenty denoising steps of a batch are estimated to take longer]",
    metavar="SECONDS",
)
@_option(
    "log-format",
    click.Choice(limits.LOG_FORMATS),
    "Format of the log on standard error: lines for people (text), or one JSON object a line (json), the last of which "
    "tells how the command ended. json has a line for each finished shard, and text has it with --verbose.  "
    "[default: text]",
)
@click.option("-q", "--quiet", "verbosity", flag_value="quiet", help="Log warnings and errors alone.")
@click.option("-v", "--verbose", "verbosity", flag_value="verbose", help="Log each finished shard too.")
@_option(
    "address",
    str,
    "Ray cluster to run on; 'local' starts a new one on this machine.  [default: RAY_ADDRESS; else the cluster that "
    "this command runs in, or one that runs on this machine already; else a new local one]",
    metavar="ADDRESS",
)
@click.option(
    "--deadline",
    type=_Deadline(),
    metavar="TIME",
    help="Give workers no shard from TIME on, and end with exit code 6 once they have finished those that they have, "
    "at most two each. TIME is a date and time such as 2026-12-01T06:00, of this machine's time zone if it names none, "
    "or how long from now, such as 7h30m.",
)
@click.option(
    "--push",
    metavar="URL",
    help="Copy OUTPUT to this storage after a run that succeeds, as 'vcf-batch push' does.",
)
@json_option
@debug_option
@click.pass_context
def generate(
    ctx: click.Context, push: str | None, deadline: float | None, dump_config: bool, as_json: bool, **_: Any
) -> None:
    """Generate an image for every row of MANIFEST into OUTPUT.

    MANIFEST is a Parquet file, or a folder of them; or 'demo' or 'roles', which come with this program. It has a column
    'prompt', and optionally 'reference', 'sample_id', 'seed' and settings of single rows. OUTPUT is a folder or URL; it
    becomes a WebDataset of images, prompts and scores.

    Rerunning the same command resumes: finished shards are kept, the rest is generated.

    Exit codes: 0 done; 1 unexpected; 2 wrong option or manifest; 3 done, but more rows failed than --max-failed
    allows; 4 OUTPUT holds another run, or one is at work there; 6 --deadline came first; 130 or 143 interrupted. With
    --push also those of 'push'.
    """
    config = run_config(ctx)
    if dump_config:
        click.echo(settings_file.dump(config), nl=False)
        return
    run(config, push=push, as_json=as_json, deadline=deadline)
