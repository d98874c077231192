"""The scores that ``--with`` asks for, each with its models in exactly one version."""

import dataclasses
import difflib
import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

from vcf_batch import storage
from vcf_batch.commands.score.duplicates.search import Search
from vcf_batch.errors import UsageError, redact
from vcf_batch.models import resolution
from vcf_batch.models.names import AESTHETIC_CLIP
from vcf_batch.models.resolution import ResolvedModel
from vcf_batch.output.scores.definition import CALIBRATION_NAME, SCORE_NAME, ScoreDefinition
from vcf_batch.setup.run_models import DEFAULT_JUDGE, BegunCommits, hub_commits, lpips_identity_of
from vcf_batch.worker.scoring.resolved_score import IMAGES_AT_ONCE, PARTS, ResolvedScore, ScoreKind, with_columns

WantedKind = ScoreKind | Literal["duplicates"]

EXAMPLES: Mapping[WantedKind, str] = {
    "clip": "clip=openai/clip-vit-large-patch14",
    "dino": "dino=facebook/dinov2-base",
    "lpips-alex": "lpips-alex=FOLDER",
    "lpips-vgg": "lpips-vgg=FOLDER",
    "aesthetic": "aesthetic=sac+logos+ava1-l14-linearMSE.pth",
    "texture": "texture",
    "python": "python=my_module:my_function",
    "duplicates": "duplicates",
}
"""How each kind of score is asked for."""

_WANTED = re.compile(r"(?P<kind>[^:=]*)(?::(?P<name>[^=]*))?(?:=(?P<source>.*))?", re.DOTALL)
_FUNCTION = re.compile(r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<function>[A-Za-z_]\w*)")


class Wanted(NamedTuple):
    """A score as the command line asks for it: ``KIND[:NAME][=SOURCE]``."""

    kind: WantedKind
    name: str
    source: str


def parse(text: str) -> Wanted:
    """A score such as ``clip=openai/clip-vit-large-patch14``, ``clip:large=MODEL`` or ``texture``.

    Raises:
        UsageError: there is no such kind, a model is missing or given for nothing, or the name is none.
    """
    found = _WANTED.fullmatch(text)
    assert found, "any text matches"
    kind, source = found["kind"], found["source"] or ""
    if kind not in EXAMPLES:
        near = difflib.get_close_matches(kind, EXAMPLES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(
            f"--with {redact(text)} is of no kind that is known{hint or '.'} The kinds are {', '.join(EXAMPLES)}"
        )
    kind = cast(WantedKind, kind)
    if kind != "duplicates" and bool(source) != ("=" in EXAMPLES[kind]):
        raise UsageError(
            f"--with {redact(text)} {'takes no model' if source else 'lacks its model'}: --with {EXAMPLES[kind]}"
        )
    function = _FUNCTION.fullmatch(source)
    if kind == "python" and not function:
        raise UsageError(f"--with {text} names no function: give module:function, as in --with {EXAMPLES[kind]}")
    plain = function["function"].lower() if kind == "python" and function else kind.replace("-", "_")
    name = plain if found["name"] is None else found["name"]
    if not SCORE_NAME.fullmatch(name) or f"{name}.json" == CALIBRATION_NAME:
        raise UsageError(
            f"--with {redact(text)} has the name {name!r}; a name has small letters, digits and _, begins with a "
            f"letter, and is not 'calibration': --with {kind}:NAME={redact(source)}"
        )
    return Wanted(kind, name, source)


def resolve(
    wanted: Sequence[Wanted], aesthetic_clip: str | None, there: Sequence[ScoreDefinition]
) -> tuple[ResolvedScore, ...]:
    """Find the models of scores.

    Args:
        wanted: the scores, none of them ``duplicates``.
        aesthetic_clip: the CLIP of aesthetic heads; None for the one of LAION's.
        there: the scores that the output has. One of them goes on with the commits of the Hub that it has begun with,
            though newer ones may be there by now.

    Raises:
        UsageError: a name is there twice, or a function cannot be found.
        ModelError: a model is not there, is not safe to load, or the hub cannot be reached.
        StorageError: the storage failed.
    """
    names = [each.name for each in wanted]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"two scores have the name {repeated[0]!r}: name one of them, as in --with KIND:NAME=...")
    begun = {score.name: _commits(score) for score in there}
    new = BegunCommits({})
    return tuple(_resolved(each, aesthetic_clip or AESTHETIC_CLIP, begun.get(each.name, new)) for each in wanted)


def _commits(score: ScoreDefinition) -> BegunCommits:
    """The commits on the Hub of a score's models."""
    identities = score.fields.get("models", {})
    return BegunCommits(hub_commits({name: identities.get(part, "") for part, name in score.models.items()}))


def _resolved(wanted: Wanted, aesthetic_clip: str, begun: BegunCommits) -> ResolvedScore:
    kind, name, source = cast(ScoreKind, wanted.kind), wanted.name, wanted.source
    models: dict[str, ResolvedModel] = {}
    identities: dict[str, str] = {}
    place = folder = ""
    fields: dict[str, Any] = {"kind": kind, "images_at_once": IMAGES_AT_ONCE}
    if kind == "python":
        place, folder = source, os.getcwd()
        fields = {"kind": kind, "function": source, "sha256": _hash_of_module(source, folder)}
    elif kind in ("lpips-alex", "lpips-vgg"):
        place = storage.absolute(source)
        identities["model"] = lpips_identity_of(kind.removeprefix("lpips-"), place)
    elif kind == "aesthetic":
        head = resolution.resolve_file(source, begun.commit(source))
        models = {"head": dataclasses.replace(head, name=source), "clip": begun.resolve(aesthetic_clip)}
    elif kind != "texture":
        models = {"model": begun.resolve(source)}
    identities |= {part: f"{each.identity} {each.within}".strip() for part, each in models.items()}
    if identities:
        fields["models"] = identities
    told = {part: redact(each.name) for part, each in models.items()} or ({"model": redact(source)} if place else {})
    definition = with_columns(ScoreDefinition(name, fields, told), PARTS[kind])
    return ResolvedScore(definition, kind, models, place, folder)


def _hash_of_module(function: str, folder: str) -> str:
    """Hex SHA-256 of the file of a function's module, which is found as an import finds it, and not run.

    Raises:
        UsageError: there is no such module, or it is no file of Python.
    """
    module = function.partition(":")[0]
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise UsageError(f"--with python={function}: {error}") from error
    if found is None or not found.origin or not os.path.isfile(found.origin):
        raise UsageError(
            f"--with python={function}: there is no module {module!r} in {folder} or among what is installed; give "
            "module:function"
        )
    return hashlib.sha256(storage.read_bytes(found.origin)).hexdigest()


def searches(
    wanted: Sequence[Wanted], by: str | None, threshold: float | None, aesthetic_clip: str | None
) -> list[Search]:
    """The searches for duplicates among what is wanted.

    Args:
        wanted: the scores.
        by: see :class:`Search`; None for its default.
        threshold: the distance, likewise.
        aesthetic_clip: see :func:`resolve`. No search has one.

    Raises:
        UsageError: see :class:`Search`; or a name is there twice, or something is given that no score takes.
    """
    names = [each.name for each in wanted]
    given = {name: value for name, value in (("by", by), ("threshold", threshold)) if value is not None}
    found = [each for each in wanted if each.kind == "duplicates"]
    if given and not found:
        name, value = next(iter(given.items()))
        raise UsageError(f"--{name} {value} is for --with duplicates: add it, or leave --{name} out")
    if aesthetic_clip is not None and not any(each.kind == "aesthetic" for each in wanted):
        raise UsageError(
            f"--aesthetic-clip {redact(aesthetic_clip)} is for an aesthetic head: add --with {EXAMPLES['aesthetic']}, "
            "or leave it out"
        )
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"two scores have the name {repeated[0]!r}: name one of them, as in --with KIND:NAME=...")
    return [Search(each.name, by or "phash", threshold, each.source) for each in found]


def embedding(source: str, there: Sequence[ScoreDefinition]) -> ResolvedScore:
    """The score that holds the embeddings of a CLIP for searches. Its name follows from the CLIP.

    Args:
        source: the CLIP; empty for :data:`vcf_batch.setup.run_models.DEFAULT_JUDGE`.
        there: as for :func:`resolve`.

    Raises:
        ModelError: the CLIP is not there, is not safe to load, or the hub cannot be reached.
        StorageError: the storage failed.
    """
    source = source or DEFAULT_JUDGE
    same = (_commits(score) for score in there if score.is_embedding and redact(source) in score.models.values())
    score = _resolved(Wanted("embedding", "embedding", source), AESTHETIC_CLIP, next(same, BegunCommits({})))
    named = dataclasses.replace(score.definition, name=f"embedding_{score.definition.fingerprint[:8]}")
    return dataclasses.replace(score, definition=with_columns(named, PARTS["embedding"]))
