"""The tables of ``benchmarks/evaluation.py``: shares in, Markdown out."""

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vcf_batch.metrics.bootstrap import Bootstrap, Interval

FUSIONS = ("naive", "cross_attention", "concat")
FUSION_WORDS = {"": "text only", "naive": "naive", "cross_attention": "cross-attention", "concat": "concat"}
LOOKS_AND_TETHER = "aligner"
ALIGNER_WORDS = {
    "": "",
    "aligner-paper": "the paper's loss",
    "aligner-tether": "+ tether",
    "aligner-looks": "+ captions of looks",
    LOOKS_AND_TETHER: "+ both",
}
"""What an aligner was trained with, by its folder's name."""

PROMPT = ("shape", "color")
REFERENCE = ("pattern", "background", "style", "position")
"""What :func:`worth` counts. Sizes and gradients are reported, but too few or too hard to choose a strength by."""


@dataclass(frozen=True)
class Method:
    """A UNet, an aligner, and a fusion at one strength."""

    family: str
    aligner: str
    """A key of :data:`vcf_batch.tiny.train.ALIGNERS`; "" is text only."""
    fusion: str
    strength: float

    @classmethod
    def text_only(cls, family: str) -> "Method":
        """The prompts alone."""
        return cls(family, "", "", 0.0)

    @property
    def name(self) -> str:
        """The name of its files."""
        return " ".join((self.family, self.aligner, self.fusion, f"{self.strength:g}")) if self.aligner else self.family

    @property
    def strength_words(self) -> str:
        """The strength as a table has it."""
        return f"{self.strength:g}" if self.aligner else ""


Shares = Mapping[str, Interval]
"""How often pictures show what is wanted, by its name."""


@functools.cache
def _resamples(count: int) -> Bootstrap:
    return Bootstrap(range(count), range(count))


def share(right: Sequence[int]) -> Interval:
    """The mean of zeros and ones, with its 95 % interval."""
    return _resamples(len(right)).mean(right) if right else Interval(float("nan"), None, None)


def worth(shares: Shares) -> float:
    """What strengths are chosen by: the prompt's mean share times the reference's, so that neither may be lost."""
    kept, taken = (statistics.fmean(shares[name].value for name in names) for names in (PROMPT, REFERENCE))
    return kept * taken


def best(sweep: Mapping[Method, Shares]) -> list[Method]:
    """Of each family, aligner and fusion the method at its best strength, in the order of the sweep."""
    chosen: dict[tuple[str, str, str], Method] = {}
    for method, shares in sweep.items():
        key = method.family, method.aligner, method.fusion
        if key not in chosen or worth(shares) > worth(sweep[chosen[key]]):
            chosen[key] = method
    return list(chosen.values())


Found = Mapping[str, Mapping[Method, Shares]]


def report(
    found: Found,
    perfect: Mapping[str, Shares],
    recalls: Mapping[str, float],
    settings: Mapping[str, Any],
    taken: tuple[float, float],
) -> str:
    """All tables with what is to be known about them.

    Args:
        found: the shares of each method, by the name of the cases.
        perfect: the shares of pictures that show all that is wanted.
        recalls: how often each aligner finds a picture's own caption, 0 to 1.
        settings: the evaluation's.
        taken: seconds on the clock and of CPU.
    """
    wall, cpu = (seconds / 3600 for seconds in taken)
    parts = [
        f"**{sentence(found['pairs'])}**",
        _NOTE.format(**settings),
        table(found["pairs"], perfect["pairs"]),
        f"Made in {wall:.1f} hours on the clock, {cpu:.1f} hours of CPU, training of the families included, from the "
        "last start of each stage.",
    ]
    for title, note, name in OTHERS:
        if found.get(name):
            parts += [f"### {title}", note, table(found[name], perfect[name])]
    parts += ["### Recall", _RECALL, recall_table(recalls)]
    parts += [
        "### Every strength",
        "On the {tuning_pairs} pairs that strengths are chosen on. The chosen ones are in bold.".format(**settings),
        table(found["tuning"], perfect["tuning"], best(found["tuning"])),
    ]
    return "\n\n".join(parts) + "\n"


_NOTE = """\
{pairs} pairs of a prompt that names a shape and its colour, and a reference that differs in everything; {steps} steps,
guidance scale 3. Shape and colour are the prompt's, the other columns the reference's (background: all its colours;
gradients: the right way up). A classifier reads them that is no part of any family and has seen no generated picture.
In brackets: 95% intervals. The strength of each line is the best of five on {tuning_pairs} other pairs, by the mean of
shape and colour times the mean of pattern, background, style and position. *Perfect* is what the classifier reads of
the world's own pictures of what is wanted."""

_RECALL = """\
How often an unseen picture's own caption is the nearest of 100, worded as in the aligner's training: recall@1. It is
what a training can tell without pictures, and says nothing about what they show."""

OTHERS = (
    (
        "A style that was never seen",
        """\
The family `held-out` has seen no mosaic in any stage: not its towers, not its autoencoder, not its UNet, not its
aligner. All references are mosaics. `embedded` has seen such pictures.""",
        "unseen style",
    ),
    ("A pattern that was never seen", "All references are wavy, which `held-out` has not seen.", "unseen pattern"),
    (
        "Pairs of colours that were never seen",
        """\
The references' backgrounds have two colours that `held-out` has seen, but never side by side: purple and yellow, or
green and pink.""",
        "unseen background",
    ),
    (
        "Sketches",
        """\
The references are line drawings of the world's scenes, black on white. Shape and colour are the prompt's.""",
        "sketches",
    ),
    (
        "Sketches for prompts that name no shape",
        "The same for prompts that name a colour alone: the shape, too, is the sketch's.",
        "sketches, no shape named",
    ),
    (
        "A layout that no caption names",
        """\
The references' objects are in a corner. No caption can say so, and no picture of the training shows it. *Corner* is
right if the object's centre is in the same quarter; by chance that is 25%.""",
        "corners",
    ),
    (
        "Photographs",
        """\
The references are photographs that scikit-image brings. *Palette* and *texture* are right if of all photographs the
picture's own is the nearest: by its colours, wherever they are (sliced Wasserstein distance), and by
`texture_similarity`. Chance is one in 12, 8%. *Perfect* are the photographs themselves.""",
        "photographs",
    ),
)
"""Title, explanation and name of the cases of each further table."""

COLUMNS = (*PROMPT, *REFERENCE, "size", "gradients", "corner", "palette", "texture")


def table(rows: Mapping[Method, Shares], perfect: Shares, marked: Sequence[Method] = ()) -> str:
    """A table with a line a method, in the order of their measurement."""
    columns = [name for name in COLUMNS if name in perfect]
    heads = ["UNet", "aligner trained with", "fusion", "strength", *columns]
    lines = [heads, ["---"] * len(heads), ["(perfect)", "", "", "", *(_cell(perfect[name]) for name in columns)]]
    for method, shares in rows.items():
        strength = f"**{method.strength:g}**" if method in marked else method.strength_words
        first = [method.family, ALIGNER_WORDS[method.aligner], FUSION_WORDS[method.fusion], strength]
        lines.append([*first, *(_cell(shares[name]) for name in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def recall_table(recalls: Mapping[str, float]) -> str:
    """A table with a line an aligner."""
    rows = [f"| {ALIGNER_WORDS[aligner]} | {found:.0%} |" for aligner, found in recalls.items()]
    return "\n".join(["| aligner trained with | recall@1 |", "| --- | --- |", *rows])


def _cell(found: Interval) -> str:
    if math.isnan(found.value):  # Of no pair was it wanted.
        return ""
    if found.low is None or found.high is None:
        return f"{found.value:.0%}"
    return f"{found.value:.0%} [{100 * found.low:.0f}, {100 * found.high:.0f}]"


def sentence(rows: Mapping[Method, Shares]) -> str:
    """What the table says first: the method as published, beside the method as this project ships it."""

    def said(family: str, aligner: str, words: str) -> str | None:
        for method, shares in rows.items():
            if (method.family, method.aligner, method.fusion) == (family, aligner, "concat"):
                kept, taken = (shares[name].value for name in ("color", "background"))
                return (
                    f"{words}, `concat` at its best strength of {method.strength:g} keeps the prompt's colour in "
                    f"{kept:.0%} and takes the reference's background in {taken:.0%} of the pictures"
                )
        return None

    plain = said("plain", "aligner-paper", "on a UNet that was trained as Stable Diffusion is, with the paper's loss")
    own = said("plain", LOOKS_AND_TETHER, "on the same UNet, with a tether and captions of looks")
    joined = said(
        "embedded", "aligner-paper", "on the embedded UNet, which was trained for joined tokens, with the paper's loss"
    )
    ours = said("embedded", LOOKS_AND_TETHER, "on the embedded UNet, with a tether and captions of looks")
    told = "; ".join(part for part in (plain, own, joined, ours) if part)
    return f"{told[:1].upper()}{told[1:]}."


def document(
    found: Found, perfect: Mapping[str, Shares], recalls: Mapping[str, float], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The same as JSON."""

    def plain(shares: Shares) -> dict[str, Any]:
        return {name: asdict(found) for name, found in shares.items() if not math.isnan(found.value)}

    return {
        "settings": settings,
        "recall": recalls,
        "strengths": [asdict(method) for method in best(found["tuning"])],
        "cases": {
            name: {
                "perfect": plain(perfect[name]),
                "methods": [{**asdict(method), "shares": plain(shares)} for method, shares in rows.items()],
            }
            for name, rows in found.items()
        },
    }
