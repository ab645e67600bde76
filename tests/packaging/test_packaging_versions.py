"""torch is a range for users, one exact version in the constraints; no exact version hides anywhere else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]

if sys.version_info < (3, 11):
    pytest.skip("NO TOMLLIB before Python 3.11", allow_module_level=True)

import tomllib  # noqa: E402

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
DECLARED = [Requirement(r) for group in PROJECT["optional-dependencies"].values() for r in group] + [
    Requirement(r) for r in PROJECT["dependencies"]
]
CONSTRAINTS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line.strip() and not line.startswith("#")
]


def test_declared_dependencies_are_ranges() -> None:
    assert not [str(r) for r in DECLARED for s in r.specifier if s.operator in ("==", "===")]
    (torch,) = [r for r in DECLARED if r.name == "torch"]
    assert "2.5.0" in torch.specifier and "2.13.0" in torch.specifier and "3.0.0" not in torch.specifier


def test_constraints_are_exact_and_inside_the_ranges() -> None:
    exact = {r.name: next(iter(r.specifier)) for r in CONSTRAINTS}
    assert all(s.operator == "==" for s in exact.values())
    assert exact["torch"].version == "2.13.0"
    for requirement in DECLARED:
        if requirement.name != "bitdial":
            assert exact[requirement.name].version in requirement.specifier, requirement.name


def test_build_requirements_are_ranges_that_the_test_environment_holds() -> None:
    """The tests build without isolation, hence with what the dev extra brings."""
    needed = {r.name: r for r in map(Requirement, PYPROJECT["build-system"]["requires"])}
    dev = {r.name: r for r in map(Requirement, PROJECT["optional-dependencies"]["dev"])}
    exact = {r.name: next(iter(r.specifier)) for r in CONSTRAINTS}
    for name, requirement in needed.items():
        assert not [s for s in requirement.specifier if s.operator in ("==", "===")]
        assert exact[name].version in requirement.specifier
        assert dev[name].specifier == requirement.specifier
