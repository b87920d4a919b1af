# SPDX-License-Identifier: Apache-2.0
"""Runs parts of benchmarks' own code, read from the snapshots in the folder that BENCHMARK_CODE names.

Their scripts load models and import what is not installed here. So single functions, and the statements of a script
that come after its last score, are taken out of the file by its syntax tree and run with names that the test gives.
"""

import ast
import os
import warnings
from pathlib import Path

import pytest

FOLDER = os.environ.get("BENCHMARK_CODE")


def snapshots(marker: str) -> list[Path]:
    """The folders in BENCHMARK_CODE that have a file of this name."""
    folders = sorted(Path(FOLDER).iterdir()) if FOLDER else []
    return [folder for folder in folders if (folder / marker).is_file()]


def needed(marker: str) -> list:
    """Arguments of pytest.mark.parametrize: each snapshot, or one that is skipped with what is missing."""
    found = snapshots(marker)
    if found:
        return [pytest.param(folder, id=folder.name) for folder in found]
    reason = f"needs a snapshot with {marker} in a folder of the folder BENCHMARK_CODE"
    return [pytest.param(None, marks=pytest.mark.skip(reason=reason))]


def run(nodes: list, names: dict, path: Path) -> dict:
    module = ast.fix_missing_locations(ast.Module(body=nodes, type_ignores=[]))
    exec(compile(module, str(path), "exec"), names)
    return names


def tree(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escape sequences
        return ast.parse(path.read_text(encoding="utf-8"))


def functions(path: Path, wanted: tuple[str, ...], names: dict) -> dict:
    """Functions and constants of a module, defined among the names."""
    nodes = [
        node
        for node in tree(path).body
        if getattr(node, "name", None) in wanted
        or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in wanted)
    ]
    assert len(nodes) == len(wanted), [ast.unparse(node)[:40] for node in nodes]
    return run(nodes, names, path)


def function(path: Path, name: str) -> ast.AST:
    """A function or a method, wherever it is."""
    return next(node for node in ast.walk(tree(path)) if getattr(node, "name", None) == name)


def rest(statements: list, begins: str) -> list:
    """The statements from the first that begins so."""
    at = next(i for i, node in enumerate(statements) if ast.unparse(node).startswith(begins))
    return statements[at:]
