# SPDX-License-Identifier: Apache-2.0
"""The package as a whole: what importing it does, and who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_lip


PACKAGE = Path(hf_lip.__file__).parent

# a module may import from its own level and from the levels before it
LEVELS = [
    ("ops",),
    ("layers",),
    ("models",),
    ("spectral", "card_text"),
    ("smoothing", "checkpoints", "metrics", "tracking_metrics", "data", "training", "plots", "audit"),
    ("pipelines",),
    ("cards", "evaluate_modules", "hub"),
    ("assets", "registration", "cli", ""),
]
RANK = {name: rank for rank, names in enumerate(LEVELS) for name in names}


def module_name(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported_parts(path: Path) -> set[str]:
    """First component, below hf_lip, of everything the file imports from the package."""
    own = path.relative_to(PACKAGE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = own[: len(own) - node.level + 1]
            full = (*base, *(node.module or "").split(".")) if node.module else base
            names = [full] if full and full[0] else [(alias.name,) for alias in node.names]
            found |= {name[0] for name in names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_lip":
            found |= {[*node.module.split("."), alias.name][1] for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("hf_lip.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    parts = module_name(path)
    own = RANK[parts[0] if parts else ""]
    if not parts:
        return
    for part in imported_parts(path):
        if part == "__version__":
            continue
        assert part in RANK, f"{part} has no level"
        assert RANK[part] <= own, f"{path} imports {part}, which lies above it"


def test_ops_know_neither_modules_nor_transformers():
    for path in (PACKAGE / "ops").glob("*.py"):
        text = path.read_text()
        assert "transformers" not in text
        assert "nn.Module" not in text


def test_the_checker_shares_no_code_with_what_it_checks():
    for path in (PACKAGE / "checkpoints").glob("verify*.py"):
        assert imported_parts(path) <= {"checkpoints", "__version__"}


def test_import_registers_and_nothing_else():
    script = (
        "import sys, hf_lip\n"
        "from transformers import AutoConfig\n"
        "from transformers.pipelines import PIPELINE_REGISTRY\n"
        "hf_lip.registration.register()\n"
        "assert AutoConfig.for_model('lipschitz_vision').model_type == 'lipschitz_vision'\n"
        "assert 'certify' in PIPELINE_REGISTRY.get_supported_tasks()\n"
        "for heavy in ('matplotlib', 'datasets', 'evaluate', 'typer.testing'):\n"
        "    assert heavy not in sys.modules, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=PACKAGE.parent)


def test_public_names():
    for name in hf_lip.__all__:
        assert getattr(hf_lip, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = hf_lip.nonsense


def test_every_source_file_has_a_licence_line():
    for folder in (PACKAGE, PACKAGE.parent / "tests", PACKAGE.parent / "scripts"):
        for path in folder.rglob("*.py"):
            text = path.read_text()
            assert not text or text.startswith("# SPDX-License-Identifier: Apache-2.0"), path
