"""Import borders at run time: what must work on a machine without torch. Their static side is import-linter's."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bitdial

# Stands in for a machine without these packages: any attempt to import them fails.
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "timm", "sklearn", "matplotlib", "PIL"}:
            raise ModuleNotFoundError("blocked: " + name, name=name)
        return None

sys.meta_path.insert(0, Blocker())
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_import_of_the_package_is_light() -> None:
    code = (
        "import sys, bitdial\n"
        "heavy = {'torch', 'torchvision', 'timm', 'sklearn', 'matplotlib', 'scipy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(bitdial.__version__)"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    "module",
    [
        "bitdial.api",
        "bitdial.artifact",
        "bitdial.cli",
        "bitdial.engines",
        "bitdial.engines.cpu",
        "bitdial.errors",
        "bitdial.graph.ir",
        "bitdial.layout",
        "bitdial.quantization.program",
        "bitdial.report",
        "bitdial.selection",
        "bitdial.serving",
    ],
)
def test_imports_without_torch(module: str) -> None:
    done = run(f"{BLOCKER}\nimport {module}")
    assert done.returncode == 0, done.stderr


def test_the_blocker_blocks() -> None:
    done = run(f"{BLOCKER}\nimport bitdial.zoo.resnet")
    assert done.returncode == 1 and "blocked: torch" in done.stderr


def test_no_module_unpickles() -> None:
    """Wherever torch or NumPy read a file, their unpickling is switched off explicitly."""
    assert bitdial.__file__ is not None
    for path in sorted(Path(bitdial.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            called = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            where = f"{path.name}:{node.lineno}"
            if called == "torch.load":
                assert options.get("weights_only") == "True", f"{where}: torch.load without weights_only=True"
            if called in ("np.load", "numpy.load"):
                assert options.get("allow_pickle") == "False", f"{where}: np.load without allow_pickle=False"
