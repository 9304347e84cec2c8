# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, where things lie, and what every file has."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tutelage.methods import cards, catalogue, module

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "tutelage"
#: Each layer may import what stands before it, and itself, but not its neighbours.
LAYERS = (
    ("functional",),
    ("core",),
    ("methods", "tasks", "models", "data"),
    ("train", "export"),
    ("report", "serve"),
    ("run",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
BAD_STEMS = ("utils", "util", "common", "helper", "helpers", "misc")
#: Text files of the repository; what tools leave behind is not part of it.
TEXT = (
    ".py",
    ".md",
    ".toml",
    ".yaml",
    ".yml",
    ".json",
    ".cfg",
    ".txt",
    ".html",
    ".css",
    ".js",
    ".svg",
    ".sh",
)
LEFT_BEHIND = {".git", ".venv", ".mypy_cache", ".ruff_cache", ".hypothesis", "build", "dist", "runs", "site"}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def repository() -> list[Path]:
    """Every text file that is part of the project."""
    return sorted(
        path
        for path in ROOT.rglob("*")
        if path.is_file()
        and (path.suffix in TEXT or path.name in ("Makefile", "LICENSE"))
        and not LEFT_BEHIND & set(path.relative_to(ROOT).parts)
    )


def name_of(path: Path) -> str:
    """The dotted name of a source file."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    """Every module of ours that a file imports, wherever in it; names taken from a package are looked up."""
    home = name_of(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "tutelage")
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                base = home.split(".") if path.stem == "__init__" else home.split(".")[:-1]
                base = base[: len(base) - node.level + 1]
                origin = ".".join([*base, origin] if origin else base)
            if origin.split(".")[0] != "tutelage":
                continue
            for alias in node.names:
                deeper = PACKAGE.parent.joinpath(*origin.split("."), alias.name)
                known = deeper.is_dir() or deeper.with_suffix(".py").is_file()
                yield f"{origin}.{alias.name}" if known else origin


def trespass(here: str, there: str) -> str | None:
    """What is wrong with one import, or None."""
    one, other = here.split("."), there.split(".")
    if len(other) < 2 or len(one) < 2:
        return None
    if one[1] not in LEVEL or other[1] not in LEVEL:
        return "a package that stands in no layer"
    if one[1] == other[1]:
        apart = one[1] == "methods" and len(one) > 3 and len(other) > 3 and one != other
        return "a method imports another method" if apart else None
    if LEVEL[other[1]] >= LEVEL[one[1]]:
        return f"{one[1]} comes before {other[1]}, or beside it"
    return None


@pytest.mark.parametrize(
    ("here", "there", "allowed"),
    [
        ("tutelage.methods.logits.kd", "tutelage.core.term", True),
        ("tutelage.methods.logits.kd", "tutelage.functional.divergence", True),
        ("tutelage.methods.logits.dkd", "tutelage.methods.logits.kd", False),
        ("tutelage.methods.logits.dkd", "tutelage.methods", True),
        ("tutelage.methods.logits.kd", "tutelage.tasks.classification", False),
        ("tutelage.core.term", "tutelage.methods", False),
        ("tutelage.functional.noise", "tutelage.core.error", False),
        ("tutelage.train.loop", "tutelage.export.onnx", False),
        ("tutelage.cli.distill", "tutelage.run.recipe", True),
        ("tutelage.run.recipe", "tutelage.cli", False),
        ("tutelage.core.term", "tutelage.elsewhere", False),
    ],
)
def test_the_rule_of_directions(here: str, there: str, allowed: bool) -> None:
    assert (trespass(here, there) is None) == allowed


def test_an_import_is_seen_wherever_it_stands() -> None:
    file = PACKAGE / "methods" / "logits" / "kd.py"
    found = set(imported(file))
    assert {"tutelage.core", "tutelage.core.error", "tutelage.functional.divergence"} <= found
    assert "tutelage.core.objective" in set(imported(PACKAGE / "core" / "term.py"))  # inside a function


def test_imports_run_one_way() -> None:
    wrong = [
        f"{name_of(path)} imports {there}: {said}"
        for path in sources()
        for there in imported(path)
        if (said := trespass(name_of(path), there))
    ]
    assert not wrong, "\n".join(wrong)
    assert sum(1 for path in sources() for _ in imported(path)) > 50


def test_every_package_stands_in_a_layer() -> None:
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert packages <= set(LEVEL)
    assert {"functional", "core", "methods"} <= packages


def test_the_catalogue_and_the_command_line_do_not_load_torch() -> None:
    program = (
        "import sys, tutelage.cli, tutelage.methods, tutelage.core; tutelage.methods.cards(); "
        "print(*sorted(m for m in ('torch', 'timm', 'transformers', 'torchvision') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_stems_of_methods_are_unique() -> None:
    files = [path for path in (PACKAGE / "methods").glob("*/*.py") if path.stem != "__init__"]
    stems = [path.stem for path in files]
    assert len(stems) == len(set(stems)) == len(cards())


def test_families_hold_only_method_files() -> None:
    for folder in (PACKAGE / "methods").iterdir():
        if not folder.is_dir() or folder.name == "__pycache__":
            continue
        assert (folder / "__init__.py").read_text(encoding="utf-8") == "", f"{folder.name}/__init__.py holds code"
        for path in folder.iterdir():
            if path.name in ("__pycache__", "__init__.py"):
                continue
            assert path.suffix == ".py", f"{path.name} lies among methods"
            assert path.stem in catalogue(), f"{folder.name}/{path.name} has no card"


@pytest.mark.parametrize("stem", cards())
def test_what_a_module_reads_as_its_card_is_its_card(stem: str) -> None:
    home = module(stem)
    assert cards()[stem] == home.CARD
    assert catalogue()[stem].objective == home.OBJECTIVE


def test_every_source_has_its_licence() -> None:
    """The line on top; a package's own file may be empty."""
    texts = {path: path.read_text(encoding="utf-8") for path in sources()}
    line = "# SPDX-License-Identifier: Apache-2.0\n"
    bare = [path for path, text in texts.items() if not text.startswith(line)]
    assert not [name_of(path) for path in bare if texts[path] or path.name != "__init__.py"]


def test_no_file_is_named_after_nothing() -> None:
    assert not [path for path in (*PACKAGE.rglob("*"), *(ROOT / "tests").rglob("*")) if path.stem in BAD_STEMS]


def test_nothing_speaks_of_one_machine() -> None:
    """No absolute path of somebody's machine in what the repository says; `~` and relative paths are fine."""
    places = "|".join(("work", "tmp", "home", "root", "Users", "mnt", "scratch"))
    path_of_a_machine = re.compile(rf"(?<![\w.~/)}}\]-])/(?:{places})(?![\w-])")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in repository()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if path_of_a_machine.search(line)
    ]
    assert not found, "\n".join(found)
    assert path_of_a_machine.search('see "' + "/wor" + 'k/file"')
    assert len(repository()) > 50
