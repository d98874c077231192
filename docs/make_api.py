"""Write docs/api.md, the public names of Python as their docstrings have them: ``make reference``."""

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vcf_batch

PAGE = Path(__file__).parent / "api.md"

GROUPS = {
    "Functions": ("run", "preview", "evaluate", "train_aligner"),
    "Outputs and results": ("Output", "Status", "Summary", "Evaluation", "TrainingSummary"),
    "Models": ("VCFPipeline", "ImageAligner"),
    "Manifests": ("Manifest",),
    "Settings": ("RunConfig", "TrainingConfig"),
}
"""Public names by the heading that they are told under."""

_SETTINGS_OF = {"run": "RunConfig", "preview": "RunConfig", "evaluate": "RunConfig", "train_aligner": "TrainingConfig"}
_SECTION = re.compile(r"^(Args|Returns|Yields|Raises):$", re.MULTILINE)
_ROLE = re.compile(r":\w+:`~?(?:[\w.]*\.)?(\w+)`")


def api() -> str:
    """The page."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "# Python: public names\n"
    yield "Written by `docs/make_api.py` from the docstrings; `make reference` writes it anew."
    yield "[Python](python.md) shows them at work. Importing `vcf_batch` is cheap: what needs torch or Ray loads when"
    yield "it is first used. Errors are those of [the reference](reference.md#errors-and-exit-codes), in"
    yield "`vcf_batch.errors`.\n"
    yield "| | |\n|---|---|"
    for heading, names in GROUPS.items():
        yield f"| {heading.lower()} | {', '.join(f'[{name}](#{name.lower()})' for name in names)} |"
    for heading, names in GROUPS.items():
        yield f"\n## {heading}"
        for name in names:
            yield f"\n### {name}\n"
            yield from _told(name, getattr(vcf_batch, name))


def _told(name: str, what: Any) -> Iterator[str]:
    if not inspect.isclass(what):
        own = ast.parse(inspect.getsource(what)).body[0]
        assert isinstance(own, ast.FunctionDef)
        yield _signature(name, own)
        yield from _docstring(what.__doc__)
        kind = _SETTINGS_OF[name]
        yield f"\nThe settings are the fields of [{kind}](#{kind.lower()}); `help({name})` lists them."
        return
    classes = [each for each in reversed(what.__mro__) if each.__module__.startswith("vcf_batch.")]
    yield from _docstring(what.__doc__)
    yield from _fields(what, classes)
    found: dict[str, ast.FunctionDef] = {}
    for each in classes:
        functions = (node for node in _body(each) if isinstance(node, ast.FunctionDef))
        for node in functions:
            if ast.get_docstring(node) and (node.name == "__call__" or not node.name.startswith("_")):
                found[node.name] = node
    if "__call__" not in found and "vcf_batch" in getattr(what.__call__, "__module__", ""):
        # The call of a class may be a function of another module.
        called = ast.parse(inspect.getsource(inspect.unwrap(what.__call__))).body[0]
        assert isinstance(called, ast.FunctionDef)
        found["__call__"] = called
    for method, node in found.items():
        decorators = {ast.unparse(each) for each in node.decorator_list}
        if decorators & {"property", "functools.cached_property"}:
            yield f"\n**`{name}.{method}`**: {_inline(_SECTION.split(ast.get_docstring(node) or '')[0])}"
            continue
        yield f"\n**`{name}.{method}`**\n" if method != "__call__" else f"\n**Calling a `{name}`**\n"
        yield _signature(method, node)
        yield from _docstring(ast.get_docstring(node))


def _body(kind: type) -> list[ast.stmt]:
    module = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(module, ast.ClassDef)
    return module.body


def _fields(what: type, classes: list[type]) -> Iterator[str]:
    """The fields of a dataclass as a table, each with the text below it."""
    if not dataclasses.is_dataclass(what):
        return
    texts: dict[str, str] = {}
    for each in classes:
        body = _body(each)
        for node, following in zip(body, [*body[1:], ast.Pass()], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                value = following.value if isinstance(following, ast.Expr) else None
                text = str(value.value) if isinstance(value, ast.Constant) else ""
                texts[node.target.id] = f"{ast.unparse(node.annotation)}\0{text}"
    yield "\n| field | type | default | |\n|---|---|---|---|"
    for field in dataclasses.fields(what):
        if field.name.startswith("_"):
            continue
        kind, _, text = texts[field.name].partition("\0")
        default = "" if field.default is dataclasses.MISSING else f"`{_cell(repr(field.default))}`"
        yield f"| `{field.name}` | `{_cell(kind)}` | {default} | {_cell(_inline(text))} |"


def _signature(name: str, node: ast.FunctionDef) -> str:
    arguments = [each for each in (ast.unparse(node.args),) if each]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    text = re.sub(r"^(self|cls)(: '\w+')?(, |$)", "", "".join(arguments))
    line = f"{name}({text}){returns}"
    if len(line) > 110:
        line = f"{name}(\n{textwrap.fill(text, 106, initial_indent='    ', subsequent_indent='    ')}\n){returns}"
    return f"```text\n{line}\n```\n"


def _docstring(text: str | None) -> Iterator[str]:
    """A docstring as Markdown: its sections become lists."""
    before, *sections = _SECTION.split(inspect.cleandoc(text or ""))
    yield _marked(before.strip())
    for title, section in zip(sections[::2], sections[1::2], strict=True):
        yield f"\n{title}:\n"
        yield from _items(title, textwrap.dedent(section.strip("\n")))


def _items(title: str, section: str) -> Iterator[str]:
    if title in ("Returns", "Yields"):
        yield _inline(section)
        return
    for item in re.split(r"\n(?=\S)", section):
        names, colon, text = item.partition(":")
        yield f"- `{names.strip()}`: {_inline(text)}" if colon else f"- {_inline(item)}"


def _marked(text: str) -> str:
    return _ROLE.sub(r"`\1`", text).replace("``", "`")


def _inline(text: str) -> str:
    return _marked(" ".join(text.split()))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(api())
