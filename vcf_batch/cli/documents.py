"""The documents that commands print with ``--json``: their fields, with types and meanings.

``a.b`` is the field ``b`` of the object ``a``. A type is one or several of JSON Schema's, with ``|`` between them. A
field is left out only where its meaning says so. New fields may come in any version; a field changes its type or its
meaning, or goes, only with a new minor version (0.3), and the changelog says so.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Field(NamedTuple):
    """A field of a document."""

    type: str
    meaning: str
    optional: bool = False
    """Whether it may be left out."""


Fields = Mapping[str, Field]

_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list, tuple),
    "object": (dict,),
    "null": (type(None),),
}

_FINDINGS: Fields = {
    "output": Field("string", "The output, without secrets."),
    "rows": Field("integer", "Number of its rows."),
    "shards": Field("integer", "Number of its shards."),
    "rows_read": Field("integer", "Number of rows that were read. Left out for an export.", True),
    "shards_read": Field("integer", "Number of shards that were read. Left out for an export.", True),
    "damaged": Field("boolean", "Whether anything is damaged."),
    "unfinished": Field("integer", "Number of shards that are not generated yet."),
    "findings": Field(
        "array", "What was found. Each is an object of place, cause, kind (damage, unfinished or note) and is_damage."
    ),
}

_RUN: Fields = {
    "output": Field("string", "The output, without secrets."),
    "rows.total": Field("integer", "Number of rows of the run."),
    "rows.resumed": Field("integer", "Number of rows that were there before this call."),
    "rows.success": Field("integer", "Number of rows with a sample."),
    "rows.rejected": Field("integer", "Number of rows that gates rejected."),
    "rows.failed": Field("integer", "Number of rows that failed."),
    "prompts_truncated": Field("integer", "Number of rows whose prompts were cut off."),
    "seconds": Field("number", "Wall time of this call in seconds."),
}

DOCUMENTS: Mapping[str, Fields] = {
    "manifest": {
        "manifest": Field("string", "The manifest that was written, without secrets."),
        "rows": Field("integer", "Number of its rows."),
        "prompts": Field("integer", "Number of prompts that were paired."),
        "duplicates": Field("integer", "Number of prompts that are equal to an earlier one."),
        "blank": Field("integer", "Number of blank prompts, which are left out."),
        "seeds": Field("integer|null", "Number of seeds that are written for each pair; null if none is."),
        "references": Field("integer", "Number of reference images."),
        "skipped": Field(
            "object",
            "Files that are no references, by reason: objects of files, their number, and first, some names.",
        ),
    },
    "plan": {
        "output": Field("string", "The output, without secrets."),
        "problems": Field("array", "Reasons to refuse the run."),
        "doomed_rows": Field("array", "Rows among the first ones that would fail, each with the reason."),
        "long_prompts.max_tokens": Field("integer|null", "Tokens of a prompt that the text encoder reads."),
        "long_prompts.rows": Field("integer", "Number of the first rows whose prompts have more."),
        "columns": Field("object", "What becomes of the manifest's columns, in words."),
        "rows_having": Field("object|null", "Number of rows with a value, by column; null where rows are not counted."),
        "loras": Field("object|null", "Batches by LoRAs, as_it_is and sorted; null if rows name none."),
        "rows": Field(
            "integer",
            "Number of rows. This and all that follow, but measurement, are left out where the "
            "manifest or the model cannot be read.",
            True,
        ),
        "rows_done": Field("integer", "Number of rows that are there already.", True),
        "shards": Field("integer", "Number of shards.", True),
        "shards_done": Field("integer", "Number of shards that are there already.", True),
        "shard_size": Field("integer", "Number of rows in a shard.", True),
        "workers": Field("integer", "Number of workers that the time is for.", True),
        "gpus_per_worker": Field("number|null", "GPUs of a worker.", True),
        "bytes": Field("integer|null", "Bytes of the whole output; null without a measurement.", True),
        "seconds": Field("number|null", "Wall time of the rest in seconds; null without a measurement.", True),
        "device_hours": Field(
            "number|null", "Hours of GPUs, or of workers without one; null without a measurement.", True
        ),
        "cost": Field("number|null", "Cost of these hours; null without a measurement or a price.", True),
        "measurement": Field("object|null", "The speed: source, device, seconds_per_row, bytes_per_row, load_seconds."),
    },
    "preview": {"picture": Field("string", "The PNG that was written, without secrets.")},
    "generate": _RUN,
    "status": {
        "output": Field("string", "The output, without secrets."),
        "state": Field("string", "finished, running or stopped."),
        "model": Field("string|null", "Name of the model."),
        "embedded_test_model": Field("boolean", "Whether it is the embedded test model."),
        "ip_adapter": Field("string|null", "The IP-Adapter of the run."),
        "loras": Field("array", "The LoRAs of the run, in words."),
        "fusion": Field("string", "The fusion of the run."),
        "strength": Field("number|null", "The strength of the run."),
        "rows.total": Field("integer", "Number of rows of the run."),
        "rows.success": Field("integer", "Number of rows with a sample."),
        "rows.rejected": Field("integer", "Number of rows that gates rejected."),
        "rows.failed": Field("integer", "Number of rows that failed."),
        "shards.total": Field("integer", "Number of shards of the run."),
        "shards.done": Field("integer", "Number of finished shards."),
        "shards.retried": Field("integer", "Number of shards that took more than one attempt."),
        "prompts_truncated": Field("integer", "Number of rows whose prompts were cut off."),
        "bytes": Field("integer", "Bytes of the finished shards."),
        "rows_per_second": Field("number|null", "Rate of all workers at work."),
        "workers": Field("integer", "Number of workers at work."),
        "seconds_left": Field("number|null", "Wall time of the rest in seconds."),
        "last_shard_ended": Field("string|null", "When the last shard ended, as an ISO date."),
        "means": Field("object", "Mean of each score."),
        "device_types": Field("integer", "Number of types of devices."),
        "devices": Field("object", "By device, an object of rows and rows_per_worker_second."),
        "device_busy": Field("number|null", "Share of the workers' time that was sampling, 0 to 1."),
        "set_aside": Field("object", "Shards that were set aside, with the reason."),
        "damaged": Field("object", "Shards that are damaged, with the reason."),
        "files_listed": Field("boolean", "Whether the counts were compared with the files that are there."),
        "scores": Field("object", "Scores that were added: by name, an object of shards, the number that have it."),
        "causes": Field("array", "Causes of failures: objects of status, text, count, example_key and example."),
        "owner": Field("object|null", "Who is at work: host, pid, started, silent (seconds), alive; null for nobody."),
    },
    "report": {
        "page": Field("string", "The page that was written, without secrets. Left out if none was.", True),
        "picture": Field("string", "The picture that was written. Left out if none was.", True),
        "first": Field("string", "The first output. This and what follows are there for two outputs only.", True),
        "second": Field("string", "The second output.", True),
        "both": Field("integer", "Number of keys in both.", True),
        "unlike": Field("integer", "Number of keys in both whose rows have another prompt or reference.", True),
        "first_alone": Field("integer", "Number of keys in the first alone.", True),
        "second_alone": Field("integer", "Number of keys in the second alone.", True),
        "same_image": Field("integer", "Number of keys with the same image.", True),
        "image_gained": Field("integer", "Number of keys with an image in the second alone.", True),
        "image_lost": Field("integer", "Number of keys with an image in the first alone.", True),
        "scores": Field(
            "object",
            "By score, an object of rows, means, better, worse, and keys that improved and worsened.",
            True,
        ),
    },
    "verify": _FINDINGS,
    "repair": _RUN,
    "score": {
        "output": Field("string", "The output, without secrets."),
        "scores": Field("object", "Columns of each score that was asked for."),
        "shards": Field("integer", "Number of finished shards."),
        "scored": Field("integer", "Number of shards that this call scored."),
        "without": Field("integer", "Number of images that could not be scored."),
        "notes": Field("array", "Remarks, such as the number of duplicates."),
        "damaged": Field("integer", "Number of damaged shards, which are left out."),
        "unfinished": Field("integer", "Number of shards that are not generated yet."),
        "calibration": Field("object|null", "The content of _scores/calibration.json; null without --calibrate."),
    },
    "export": {
        "target": Field("string", "The dataset, without secrets."),
        "rows": Field("integer", "Number of its rows."),
        "splits": Field("object", "Number of rows of each split."),
        "left_out": Field("object", "Number of rows that are left out, by reason."),
        "shards": Field("integer", "Number of its shards."),
        "written": Field("integer", "Number of shards that this call has written."),
        "notes": Field("array", "Lines that name what was left out."),
    },
    "push": {
        "target": Field("string", "The target, without secrets."),
        "copied": Field("integer", "Number of shards that were copied."),
        "there": Field("integer", "Number of shards that were there."),
        "damaged": Field("object", "Damaged shards, which are left out, with the reason."),
        "unfinished": Field("integer", "Number of shards that are left out, as they are not generated yet."),
        "scores.copied": Field("integer", "Number of shards whose added scores were copied, summed over the scores."),
        "scores.damaged": Field("object", "Damaged scores, which are left out, with the reason."),
    },
    "card": {"card": Field("string", "The card that was written, without secrets.")},
    "model list": {
        "models": Field(
            "array",
            "Objects of name, kind (model, ip_adapter), base, image_encoder, what, licence, gigabytes, needs, cached.",
        )
    },
    "model fetch": {
        "name": Field("string", "The name that was asked for."),
        "source": Field("string", "The Hub id, with ':' and the file of an adapter."),
        "revision": Field("string", "The commit."),
        "places": Field("array", "The target; without one, the place of each part in this node's cache."),
        "option": Field("string|null", "The option of a run that takes it; null for parts of a model."),
        "files": Field("integer", "Number of files."),
        "size": Field("integer", "Bytes of all files."),
        "copied": Field("integer", "Number of files that this call copied."),
    },
    "model train": {
        "out": Field("string", "The aligner, without secrets."),
        "steps": Field("integer", "Number of steps."),
        "pairs": Field("integer", "Number of pairs of image and caption."),
        "before": Field("object", "Metrics of the validation before the first step."),
        "best": Field("object", "Metrics of the validation of the aligner that was kept."),
        "seconds": Field("number", "Wall time in seconds."),
    },
    "model assemble": {"model": Field("string", "The model that was written, without secrets.")},
    "model fit-roles": {
        "file": Field("string", "The file that was written, without secrets."),
        "pairs": Field("object", "Number of pairs by attribute."),
        "kept": Field("object", "By role, the share of each attribute that it keeps."),
    },
    "model evaluate": {
        "models": Field("object", "The models of the run, as in run.json."),
        "config": Field("object", "The configuration of the run, as in run.json."),
        "versions": Field("object", "Versions of packages, as in run.json."),
        "interval": Field("object", "The bootstrap: level and draws."),
        "methods": Field("array", "Objects of method, fusion, strength, samples, scores, relative and shown."),
    },
}
"""Fields of the document of each command, by the command's name."""


is_strict = False
"""Whether a document that is not as its fields say is an error, as it is in tests. A result is printed all the same."""


def check(name: str, document: Mapping[str, Any], fields: Fields) -> None:
    """Compare the document of a command with its fields, if :data:`is_strict`.

    Raises:
        AssertionError: they differ.
    """
    if is_strict and (found := faults(document, fields)):
        raise AssertionError(f"--json of {name}: {'; '.join(found)}")


def faults(document: Mapping[str, Any], fields: Fields) -> list[str]:
    """What in a document is not as its fields say."""
    parents = {name.partition(".")[0] for name in fields if "." in name}
    found = dict(_flat(document, parents))
    lines = [f"{name} is not among its fields" for name in found.keys() - fields.keys()]
    lines += [f"{name} is missing" for name, field in fields.items() if not field.optional and name not in found]
    for name in found.keys() & fields.keys():
        value, types = found[name], fields[name].type.split("|")
        accepted = tuple(each for kind in types for each in _TYPES[kind])
        if not isinstance(value, accepted) or (isinstance(value, bool) and "boolean" not in types):
            lines.append(f"{name} is {value!r}, and not {fields[name].type}")
    return sorted(lines)


def _flat(document: Mapping[str, Any], parents: set[str]) -> Iterator[tuple[str, Any]]:
    for name, value in document.items():
        if name in parents and isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", each) for inner, each in value.items())
        else:
            yield name, value
