"""Imports go one way: among the repository's packages, and in the library."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What each package may import of the others.
PACKAGES = {
    "scripts": {"kivi_jax", "tools"},
    "benchmarks": {"kivi_jax", "benchmarks", "tools"},
    "tools": {"kivi_jax", "tools"},
    "kivi_jax": {"kivi_jax"},
    "models": {"kivi_jax"},
    "pallas_kernels": {"kivi_jax"},
}
# And the rooms below the library's loops, in which nothing may know what is above it.
ROOMS = {
    "kivi_jax.models": {"kivi_jax.models", "kivi_jax.promotion"},
    "kivi_jax.kv": {"kivi_jax.kv", "kivi_jax.arguments", "kivi_jax.promotion"},
    "kivi_jax.pallas_kernels": {"kivi_jax.pallas_kernels", "kivi_jax.kv"},
}


def modules(package: str) -> Iterator[tuple[str, set[str]]]:
    """The modules of a package and what they import, by their names as modules of the library."""
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        yield (f"kivi_jax.{name}" if package in ("models", "pallas_kernels") else name), imported


def library() -> dict[str, set[str]]:
    found = dict(
        module for package in ("kivi_jax", "models", "pallas_kernels") for module in modules(package)
    )
    return {name: imported & set(found) - {name} for name, imported in found.items()}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_those_below(package):
    for name, imported in modules(package):
        packages = {module.partition(".")[0] for module in imported}
        assert packages & {*PACKAGES, "tests"} <= PACKAGES[package], name


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_those_below(room):
    inside = {name: imported for name, imported in library().items() if name.startswith(f"{room}.")}
    assert inside
    for name, imported in inside.items():
        above = {
            module
            for module in imported
            if not any(f"{module}.".startswith(f"{below}.") for below in ROOMS[room])
        }
        assert above <= {"kivi_jax"}, name


def test_no_module_imports_itself_by_way_of_others():
    """The package, which a module that asks for another one names as well, is no module of its own here."""
    graph = {name: imported - {"kivi_jax"} for name, imported in library().items() if name != "kivi_jax"}
    assert len(graph) > 50
    list(graphlib.TopologicalSorter(graph).static_order())
