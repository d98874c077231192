"""The comparison of two outputs as a table for people, and as a page with pictures, which needs no other file."""

import base64
import html
import importlib.resources
from collections.abc import Iterator, Sequence

from vcf_batch import storage
from vcf_batch.errors import redact
from vcf_batch.output.output import Output
from vcf_batch.report import thumbnails
from vcf_batch.report.thumbnails import Thumbnails
from vcf_batch.report.two_outputs.pairs import Change, ScoreChange, TwoOutputs

PROMPT_BESIDE = 200
"""Most characters shown of a prompt."""

_HEADS = ("score", "rows", "first", "second", "better", "worse")
_STYLE = """
.three { display: grid; grid-template-columns: repeat(3, 160px); gap: .5rem; }
.changes { display: flex; flex-wrap: wrap; gap: 1.5rem; margin: 1rem 0; }
figure { margin: 0; max-width: 500px; } figcaption { font-size: .875rem; overflow-wrap: anywhere; }
"""


def summary(found: TwoOutputs) -> str:
    """What both have, in one line."""
    unlike = f"; {found.unlike:,} of the keys in both are of other prompts or references" if found.unlike else ""
    return (
        f"{found.both:,} keys in both, {found.alone[0]:,} in the first alone, {found.alone[1]:,} in the second alone; "
        f"{found.same:,} images with the same bytes; {found.gained:,} rows have an image in the second alone, "
        f"{found.lost:,} in the first alone{unlike}"
    )


def markdown(found: TwoOutputs) -> str:
    """The summary and a table in Markdown, a line for each score."""
    lines = [_HEADS, ["---"] * len(_HEADS), *(_cells(score) for score in found.scores)]
    return "\n".join([summary(found), "", *(f"| {' | '.join(line)} |" for line in lines)])


def _cells(score: ScoreChange) -> list[str]:
    means = (f"{mean:.4f}" for mean in score.means if mean is not None)
    name = f"{score.name} ({'higher' if score.higher_is_better else 'lower'} is better)"
    return [name, f"{score.rows:,}", *means, f"{score.better:,}", f"{score.worse:,}"]


def render(found: TwoOutputs, outputs: tuple[Output, Output]) -> str:
    """The comparison as HTML, with the pictures of the rows that changed most.

    Raises:
        DamageFound: a tar does not match its receipt.
        StorageError: the storage failed.
    """
    changes = [change for score in found.scores for change in (*score.improved, *score.worsened)]
    pictures = [
        thumbnails.read(output, {change.sides[at].number: change.sides[at].record for change in changes})
        for at, output in enumerate(outputs)
    ]
    title = html.escape(" and ".join(storage.name(output.url) for output in outputs))
    told = [html.escape(redact(output.url)) for output in outputs]
    style = (importlib.resources.files("vcf_batch.report") / "page.css").read_text("utf-8")
    heads = "".join(f'<th scope="col">{head}</th>' for head in _HEADS)
    lines = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in _cells(score))}</tr>" for score in found.scores
    )
    sections = "".join(part for score in found.scores for part in _sections(score, pictures))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{title}: vcf-batch report</title>\n<style>{style}{_STYLE}</style>\n</head>\n"
        f'<body>\n<header><p class="eyebrow">vcf-batch report</p><h1>{title}</h1>'
        f'<p class="quiet">first: {told[0]}</p><p class="quiet">second: {told[1]}</p></header>\n<main>\n'
        f'<section><h2>Scores</h2><p class="lead">{html.escape(summary(found))}.</p>'
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div></section>\n'
        f"{sections}</main>\n</body>\n</html>\n"
    )


def _sections(score: ScoreChange, pictures: Sequence[dict[int, Thumbnails]]) -> Iterator[str]:
    for title, changes in (("improved most", score.improved), ("got worse most", score.worsened)):
        if changes:
            figures = "".join(_figure(change, score.name, pictures) for change in changes)
            yield (
                f"<section><h2>Rows that {title} by {html.escape(score.name)}</h2>"
                f'<p class="lead">Reference, first output, second output.</p><div class="changes">{figures}</div>'
                "</section>\n"
            )


def _figure(change: Change, name: str, pictures: Sequence[dict[int, Thumbnails]]) -> str:
    first, second = change.sides
    shown = [pictures[at][side.number] for at, side in enumerate(change.sides)]
    reference = shown[0].reference or shown[1].reference
    tiles = [_picture(reference, "reference"), _picture(shown[0].output, "first"), _picture(shown[1].output, "second")]
    prompt = first.record["prompt"]
    prompt = prompt if len(prompt) <= PROMPT_BESIDE else prompt[: PROMPT_BESIDE - 1] + "…"
    return (
        f'<figure><div class="three">{"".join(tiles)}</div><figcaption><p>{html.escape(prompt)}</p>'
        f'<p class="quiet"><span class="key">{html.escape(first.record["key"])}</span> '
        f"{first.record[name]:.4f} → {second.record[name]:.4f}</p></figcaption></figure>"
    )


def _picture(data: bytes | None, alt: str) -> str:
    if data is None:
        return '<span class="quiet">no reference</span>'
    return f'<img alt="{alt}" src="data:image/webp;base64,{base64.b64encode(data).decode()}">'
