"""The house rules that a reviewer would otherwise have to remember."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import edje_pipeline
from edje_pipeline import errors

ROOT = Path(edje_pipeline.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Lower may not import higher; equal may import equal.
LEVELS = {
    "errors": 0,
    "progress": 0,
    "config": 1,
    "storage": 1,
    "models": 1,
    "stages": 2,
    "reranker": 3,
    "training": 4,
    "pipeline": 4,
    "cli": 5,
}


def _module_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_part_has_a_level() -> None:
    assert {_module_of(path) for path in FILES} - {"__init__"} == set(LEVELS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    part = _module_of(path)
    if part == "__init__":
        return
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "edje_pipeline" and len(parts) > 1 and parts[1] in LEVELS:
            assert LEVELS[parts[1]] <= LEVELS[part], f"{path} imports {name}"
    if part == "storage":
        assert not [n for n in _imports(path) if n.startswith("edje_pipeline.models")], f"{path} imports models"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_ray_stays_in_its_places(path: Path) -> None:
    relative = path.relative_to(ROOT).as_posix()
    if relative == "pipeline/ray_bridge.py" or relative.startswith("training/"):
        return
    assert not [n for n in _imports(path) if n.split(".")[0] == "ray"], f"{relative} imports ray"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import edje_pipeline", ["torch", "ray", "pyarrow", "numpy"]),
        ("import edje_pipeline.storage.index", ["torch", "ray", "PIL", "timm"]),
        ("import edje_pipeline.cli", ["torch", "ray", "timm", "open_clip"]),
        ("import edje_pipeline.stages.decode", ["torch", "ray"]),
    ],
)
def test_light_imports_stay_light(statement: str, absent: list[str]) -> None:
    code = f"import sys; {statement}; print([n for n in {absent!r} if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_are_pinned() -> None:
    assert edje_pipeline.__all__ == ["EdjeError", "Index", "Reranker", "__version__"]
    assert dir(edje_pipeline) == sorted(edje_pipeline.__all__)
    for name in edje_pipeline.__all__:
        assert getattr(edje_pipeline, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = edje_pipeline.nonsense


ERRORS = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.EdjeError)]


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_errors_pickle_and_print_their_message(kind: type[errors.EdjeError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("what was found, where, what to do")))
    assert type(copy) is kind
    assert str(copy) == "what was found, where, what to do"
    assert kind.__name__.endswith("Error")
    assert kind.__name__ in (errors.__doc__ or ""), "the tree in the module docstring is out of date"


def test_no_file_grows_past_its_one_idea() -> None:
    too_long = {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
    assert not too_long
