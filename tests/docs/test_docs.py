"""README and docs: what they tell to type is run, as it stands.

The fence of a block says what becomes of it:

* ```` ```bash ````, ```` ```python ````, ```` ```sql ````: run, in the order of the page;
* ```` ```bash slow ````: run by ``make test-all`` alone;
* ```` ```bash not-run: REASON ````: not run; its options and its syntax are checked all the same;
* ```` ```text ```` and other languages: shown, not run.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import yaml

from support import ray_head
from vcf_batch.cli import main

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "manifests/README.md"]
FENCE = re.compile(r"^```(\w*)(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")
RUNNERS = {
    "bash": ["bash", "-euo", "pipefail", "-c"],
    "python": [sys.executable, "-c"],
    "sql": [sys.executable, "-c", "import duckdb, sys; print(duckdb.sql(sys.argv[1]))"],
}
SHOWN = {"text", "yaml", "dockerfile"}
SMALLER = {
    "plan": "--limit 4 --steps 2",
    "preview": "--rows 2 --steps 2",
    'generate "*" --rows': '--steps 2 --num-workers 1 --address "$RAY_ADDRESS"',
    "generate": '--limit 4 --steps 2 --num-workers 1 --address "$RAY_ADDRESS"',
    "score": '--num-workers 1 --address "$RAY_ADDRESS"',
    "model evaluate": "--pairs 2 --steps 2 --pno-samples 0",
    "model train": "--limit 300 --epochs 1 --transfer-pairs 2",
}
"""What commands get in addition, so that a page takes seconds. Of an option that is given twice the last counts, and of
the commands here the first that fits. A part of the rows takes no limit beside it."""

JOBS = {"generate": ["generate"], "train_aligner": ["model", "train"], "evaluate": ["model", "evaluate"]}
"""The command that each file of jobs/ is the entry point of."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    mark: str
    code: str

    @property
    def is_slow(self) -> bool:
        return self.mark == "slow"

    @property
    def is_run(self) -> bool:
        return self.language in RUNNERS and not self.mark.startswith("not-run")


def blocks(page: Path) -> list[Block]:
    found = FENCE.findall(page.read_text())
    return [Block(language, mark.strip(), code) for language, mark, code in found]


def commands(code: str) -> Iterator[list[str]]:
    """The commands of a bash block, each as its words."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        for word in lexer:
            if set(word) <= set("();<>|&"):
                yield command
                command = []
            else:
                command.append(word)
        yield command


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=page_id)


@each_page
def test_every_block_says_what_becomes_of_it(page: Path) -> None:
    """A fence names a language, and what is not run has a reason."""
    assert page.read_text().count("```") == 2 * len(blocks(page)), "a fence is not closed, or not at the line's start"
    for block in blocks(page):
        assert block.language in {*RUNNERS, *SHOWN}, f"a fence with the language {block.language!r}"
        assert re.fullmatch(r"|slow|not-run: \S.+", block.mark), f"a fence with the mark {block.mark!r}"


@each_page
def test_commands_have_the_options_that_are_told(page: Path) -> None:
    """Whether it can be run here or not: what is told parses, by the commands' own rules."""
    for block in blocks(page):
        if block.language == "python":
            compile(block.code, page.name, "exec")
        if block.language == "yaml":
            list(yaml.safe_load_all(block.code))
        if block.language == "bash":
            for words in commands(block.code):
                check(words)


def check(words: list[str]) -> None:
    """Parse what a command is given, without calling it."""
    for place, word in enumerate(words):
        if word == "vcf-batch":
            arguments = words[place + 1 :]
        elif match := re.fullmatch(r"(?:.*/)?jobs/(\w+)\.py", word):
            assert (ROOT / "jobs" / f"{match[1]}.py").is_file(), word
            arguments = JOBS[match[1]] + words[place + 1 :]
        else:
            continue
        command: click.Command = main
        context = click.Context(main)
        while isinstance(command, click.Group):
            name, *arguments = arguments
            found = command.get_command(context, name)
            assert found, f"no command {name!r}"
            assert not found.hidden, f"{name!r} is an old name"
            command = found
        try:
            command.make_context(name, arguments, parent=context)
        except click.ClickException as error:
            pytest.fail(f"{' '.join(words)}: {error.format_message()}")
        hidden = {flag for each in command.params if getattr(each, "hidden", False) for flag in each.opts}
        assert not hidden & {*arguments}, f"{' '.join(words)}: an old option"
    if words[:1] == ["make"]:
        targets = re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" in target:
            continue
        found = page.parent / target if target else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert anchor[1:] in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}, anchor


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    with ray_head.running() as environment:
        yield environment


@pytest.fixture(scope="module")
def demo(cluster: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo` leaves in a fresh checkout, as a folder ``out``."""
    fresh = check_out(tmp_path_factory.mktemp("demo"))
    run([Block("bash", "", "make demo")], README, fresh, cluster)
    return fresh / "out"


@pytest.fixture
def checkout(page: Path, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkout for a page. If the page begins with `make demo`, that has run before, and finds its work done."""
    if any(block.code.startswith("make demo") for block in blocks(page)):
        shutil.copytree(request.getfixturevalue("demo"), tmp_path / "out")
    return check_out(tmp_path)


def check_out(folder: Path) -> Path:
    """The repository as `make install` leaves it, with a `vcf-batch` that knows :data:`SMALLER`."""
    for part in ROOT.iterdir():
        if part.name not in ("manifests", "out", "build") and not part.name.startswith("."):
            (folder / part.name).symlink_to(part)
    shutil.copytree(ROOT / "manifests", folder / "manifests")
    programs = folder / ".venv/bin"
    programs.mkdir(parents=True)
    cases = "".join(f'"{command} "*) set -- "$@" {options};;\n' for command, options in SMALLER.items())
    called = f'{sys.executable} -m vcf_batch "$@"'
    (programs / "vcf-batch").write_text(f'#!/bin/sh\ncase "$* " in\n{cases}esac\nexec {called}\n')
    (programs / "vcf-batch").chmod(0o755)
    (folder / ".venv/.installed").touch()
    return folder


@each_page
def test_what_is_told_runs(page: Path, checkout: Path, cluster: dict[str, str]) -> None:
    """In the order of the page, in a checkout of its own, without the blocks that are slow."""
    run([block for block in blocks(page) if not block.is_slow], page, checkout, cluster)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(block.is_slow for block in blocks(page))], ids=page_id)
def test_all_that_is_told_runs(page: Path, checkout: Path, cluster: dict[str, str]) -> None:
    run(blocks(page), page, checkout, cluster)


def run(told: list[Block], page: Path, checkout: Path, cluster: dict[str, str]) -> None:
    folder = checkout / "manifests" if page.parent.name == "manifests" else checkout
    environment = cluster | {
        "PATH": os.pathsep.join((str(checkout / ".venv/bin"), str(Path(sys.executable).parent), cluster["PATH"])),
        "PYTHONPATH": str(ROOT),
        "HOME": str(checkout),
        "HF_HUB_OFFLINE": "1",
    }
    for block in filter(lambda block: block.is_run, told):
        command = [*RUNNERS[block.language], block.code]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{block.code}\n{done.stdout}\n{done.stderr}"
