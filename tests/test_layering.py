"""Who may import whom: read from the imports of every module, wherever they stand in it."""

import ast
import functools
import itertools
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import imported

PACKAGE = Path(__file__).parent.parent / "vcf_batch"
DEMO = PACKAGE.parent / "manifests" / "demo.parquet"

LAYERS = (
    ("cli",),
    ("commands", "training"),
    ("pool", "report"),
    ("driver", "worker"),
    ("setup", "tiny"),
    ("output", "vcf", "metrics"),
    ("manifest", "models"),
    ("storage", "images"),
    ("config",),
    ("",),
)
"""From the top down; "" is the vocabulary, the modules directly in the package. Those in a line do not know each other.
The two at the very root (``__init__``, ``__main__``) stand above them all."""

LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}

ALLOWED = {
    "ray": {"pool", "training"},
    "diffusers": {"vcf", "training", "tiny"},
    "torch": {*LEVEL} - {"storage", "manifest", "models", "output", "setup", "driver", "config", ""},
}
"""Which packages may import a library, at the top of a module or within a function."""


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path) -> list[tuple[int, str]]:
    """Line and full name of everything that a module imports; of the package, ``vcf_batch.package.module``."""
    return [*_imports(path)]


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from ((node.lineno, f"{node.module}.{name.name}") for name in node.names)


def package_of(path: Path) -> str:
    folder, *_ = path.relative_to(PACKAGE).parts
    return folder if folder in LEVEL else ""


MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if path not in (PACKAGE / "__init__.py", PACKAGE / "__main__.py")
)


def test_every_package_has_its_layer() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == {*LEVEL} - {""}


def test_imports_go_one_way() -> None:
    """A module imports from its own package or from one further down, never from one further up or beside."""
    wrong = []
    for path in MODULES:
        own = package_of(path)
        for line, name in imports(path):
            if not name.startswith("vcf_batch."):
                continue
            other = next((part for part in name.split(".")[1:2] if part in LEVEL), "")
            if other != own and LEVEL[other] <= LEVEL[own]:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {name}")
    assert not wrong


@pytest.mark.parametrize("library", ALLOWED)
def test_libraries_are_known_to_few_packages(library: str) -> None:
    """ray in pool/ and training/ alone, diffusers where there are networks, no torch where planning happens."""
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line} imports {name}"
        for path in MODULES
        for line, name in imports(path)
        if name.split(".")[0] == library and package_of(path) not in ALLOWED[library]
    ]
    assert not wrong


def test_a_package_is_small_enough_to_look_through() -> None:
    """At most 25 entries lie directly in the package, and 13 modules in each package, which says what it has."""
    assert len([entry for entry in PACKAGE.iterdir() if entry.name not in ("__pycache__", "py.typed")]) <= 25
    for package in {*LEVEL} - {""}:
        assert len([*(PACKAGE / package).glob("[!_]*.py")]) <= 13, package
        docstring = ast.get_docstring(parsed(PACKAGE / package / "__init__.py"))
        assert docstring, package


def test_types_are_shipped() -> None:
    """Type checkers read the annotations of an installed package only beside this file."""
    with open(PACKAGE.parent / "pyproject.toml", "rb") as file:
        data = tomllib.load(file)["tool"]["setuptools"]["package-data"]
    assert (PACKAGE / "py.typed").is_file() and data["vcf_batch"] == ["py.typed"]


def loaded(*modules: str) -> set[str]:
    """Libraries that importing ``modules`` brings in, in a fresh interpreter."""
    code = f"import sys, {', '.join(modules)}; print('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not result.stderr, "importing gives no hints, such as that of transformers to install torchvision"
    return set(result.stdout.split())


def test_planning_brings_neither_torch_nor_ray() -> None:
    """Neither importing the package or its command line, nor any module that plans, brings torch or ray in by what it
    imports in its turn."""
    light = {"storage", "manifest", "models", "output", "setup", "driver", "cli", "config", ""}
    names = [".".join(("vcf_batch", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in MODULES]
    light_names = [
        name.removesuffix(".__init__") for name, path in zip(names, MODULES, strict=True) if package_of(path) in light
    ]
    assert not loaded("vcf_batch", *light_names) & {"torch", "ray", "diffusers", "transformers"}


# What is imported adds up within an interpreter, so modules share one that do without the same libraries. `make test`
# leaves out what imports torch a second and a third time.
@pytest.mark.parametrize(
    ("modules", "left_out"),
    [
        (("worker.worker", "training.fit", "training.assembly", "tiny.train"), {"ray"}),
        pytest.param(("training.ray_training",), {"diffusers", "transformers"}, marks=pytest.mark.slow),
        (("pool.launch", "commands.score.command"), {"torch", "transformers", "diffusers"}),
        (("pool.actor",), {"torch", "numpy", "pyarrow"}),
        (("cli",), {"pyarrow", "duckdb", "PIL"}),
        pytest.param(
            ("metrics.scorer", "metrics.lpips", "commands.evaluate"), {"ray", "diffusers"}, marks=pytest.mark.slow
        ),
    ],
    ids=["worker", "training", "pool", "actor", "cli", "scores"],
)
def test_what_a_process_does_not_need_is_not_imported(modules: tuple[str, ...], left_out: set[str]) -> None:
    """A worker and a training in one process need no ray, the drivers of a run and of a scoring no torch and no models'
    library, scores no diffusers, a help text none of what reads tables and pictures. An actor brings nothing that reads
    the environment before it is set."""
    assert not loaded(*(f"vcf_batch.{module}" for module in modules)) & left_out


@pytest.mark.parametrize(
    ("arguments", "code", "left_out"),
    [
        (("--help",), 0, {"numpy", "pyarrow", "ray", "torch"}),
        (("generate", "--help"), 0, {"numpy", "pyarrow", "ray", "torch"}),
        (("plan", str(DEMO), "OUTPUT"), 0, {"ray", "torch", "diffusers", "pandas"}),
        (("status", "OUTPUT"), 2, {"ray", "torch", "transformers", "diffusers", "pandas", "PIL"}),
        (("verify", "OUTPUT"), 2, {"ray", "torch", "transformers", "diffusers", "pandas"}),
        (("generate", str(DEMO), "OUTPUT", "--max-failed", "7"), 2, {"ray", "torch", "pyarrow"}),
    ],
    ids=["help", "help of generate", "plan", "status", "verify", "refused option"],
)
def test_what_a_command_does_not_use_is_not_imported(
    arguments: tuple[str, ...], code: int, left_out: set[str], tmp_path: Path
) -> None:
    """A plan needs no torch, though it tells of GPUs; and no command needs Ray that starts no worker."""
    paths = [str(tmp_path / "out") if argument == "OUTPUT" else argument for argument in arguments]
    assert not imported.by(*paths, code=code) & left_out


def own_nodes(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of a function without those of the functions within it."""
    waiting: list[ast.AST] = [*function.body]
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            waiting += ast.iter_child_nodes(node)


def test_no_generator_waits_for_threads_of_its_own() -> None:
    """See :func:`vcf_batch.storage.reading_threads`. A context manager is read to its end by its block."""
    found = []
    for path in MODULES:
        for function in (node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef)):
            nodes = [*own_nodes(function)]
            calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
            yields = any(isinstance(node, ast.Yield | ast.YieldFrom) for node in nodes)
            manages = any("contextmanager" in ast.unparse(decorator) for decorator in function.decorator_list)
            if yields and not manages and "ThreadPoolExecutor" in calls:
                found.append(f"{path.name}: {function.name}")
    assert found == []


def test_class_names_are_unique() -> None:
    """A class name stands for one class in the whole package."""
    names = sorted(
        (node.name, str(path.relative_to(PACKAGE)))
        for path in PACKAGE.rglob("*.py")
        for node in parsed(path).body
        if isinstance(node, ast.ClassDef)
    )
    repeated = {name: [path for _, path in group] for name, group in itertools.groupby(names, lambda one: one[0])}
    assert not {name: paths for name, paths in repeated.items() if len(paths) > 1}


def constants(path: Path) -> Iterator[str]:
    """Names of the public constants of a module, those that it imports left out."""
    for node in parsed(path).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            parts = [part for target in targets for part in ast.walk(target)]
            names = [part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]
            yield from (name for name in names if not name.startswith("_"))


def test_constant_names_are_unique() -> None:
    """The name of a public constant stands for one value in the whole package."""
    places: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for name in constants(path):
            places.setdefault(name, []).append(str(path.relative_to(PACKAGE)))
    repeated = {name: sorted(paths) for name, paths in places.items() if len(paths) > 1}
    assert not repeated
