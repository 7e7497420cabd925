# SPDX-License-Identifier: Apache-2.0
"""Transformers' own common tests, taken at run time from the source distribution of the installed version.

`locate` finds them: in `HF_LIP_TRANSFORMERS_SDIST` (a source distribution, an unpacked one, or a checkout of the
version's tag), else in the user's cache, else by `pip download`. `mount` makes them importable as modules of `tests`.
"""

import importlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import transformers
import transformers.utils
from transformers.models.auto import modeling_auto


VARIABLE = "HF_LIP_TRANSFORMERS_SDIST"
VERSION_FILE = Path("src/transformers/__init__.py")
# what is unpacked: the tests, what they import beside the installed package, and the version
WANTED = re.compile(r"(tests|utils)/.+\.(py|json|txt)|src/transformers/__init__\.py")

MODULES = (
    "test_backbone_common",
    "test_configuration_common",
    "test_image_processing_common",
    "test_modeling_common",
)
# of every module here; what upstream's code is warned of is no error of ours
MARKS = [pytest.mark.conformance, pytest.mark.filterwarnings("default")]
# filled by `prepare` and `load`: where the tests are, or why they are not, and what they define
state: dict[str, Any] = {}

# arguments that every config takes
COMMON_CONFIG_ARGUMENTS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 3,
    "architectures": ["AnyModel"],
    "id2label": {0: "only"},
    "label2id": {"only": "0"},
    "problem_type": "regression",
}

# Our classes where the library keeps its own by name; its tests choose labels and inputs by these tables.
OUR_NAMES = {
    "MODEL_MAPPING_NAMES": {
        "chacal": "ChacalModel",
        "cifar_resnet": "CifarResNetModel",
        "lipschitz_vision": "LipschitzVisionModel",
    },
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": {
        "chacal": "ChacalForCausalLM",
        "chacal_gpt2": "ChacalGPT2LMHeadModel",
        "chacal_llama": "ChacalLlamaForCausalLM",
        "chacal_qwen2": "ChacalQwen2ForCausalLM",
    },
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": {"chacal": "ChacalForSequenceClassification"},
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": {"chacal": "ChacalForTokenClassification"},
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": {
        "cifar_resnet": "CifarResNetForImageClassification",
        "lipschitz_vision": "LipschitzVisionForImageClassification",
    },
    "MODEL_FOR_BACKBONE_MAPPING_NAMES": {"lipschitz_vision": "LipschitzVisionBackbone"},
}


class UnavailableError(Exception):
    """The source distribution cannot be had here; the tests are skipped with this reason."""


def version_of(folder: Path) -> str | None:
    """Version of the transformers source in `folder`, None if there is none."""
    file = folder / VERSION_FILE
    found = re.search(r'^__version__ = "(.+)"', file.read_text("utf-8"), re.MULTILINE) if file.is_file() else None
    return found.group(1) if found else None


def unpack(archive: Path, target: Path) -> Path:
    """Put the tests of a source distribution into `target`, all or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpacking-") as staging:
        with tarfile.open(archive) as tar:
            for member in tar:
                path = member.name.partition("/")[2]
                if member.isfile() and WANTED.fullmatch(path):
                    tar.extract(member, staging, filter="data")
        folders = list(Path(staging).iterdir())
        if len(folders) != 1 or version_of(folders[0]) is None:
            raise ValueError(f"{archive} is no source distribution of transformers.")
        try:
            os.rename(folders[0], target)
        except OSError:
            # another process was first
            if version_of(target) is None:
                raise
    return target


def download(version: str, target: Path) -> Path:
    """Fetch the source distribution of `version` with pip and unpack it into `target`.

    Raises:
        UnavailableError: if pip cannot fetch it.
    """
    requirement = f"transformers=={version}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        result = subprocess.run([*command, "-d", folder, requirement], capture_output=True, text=True, check=False)
        archives = list(Path(folder).glob("transformers-*.tar.gz"))
        if result.returncode or len(archives) != 1:
            said = (result.stderr.strip().splitlines() or ["no output"])[-1]
            raise UnavailableError(
                f"pip cannot fetch the source distribution of {requirement} ({said}). With a network it is fetched; "
                f"without one, set {VARIABLE} to a source distribution or a checkout of v{version}."
            )
        return unpack(archives[0], target)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "hf_lip" / "conformance"


def locate() -> Path:
    """Folder with the `tests` of the installed version of transformers.

    Raises:
        UnavailableError: if it is not here and cannot be fetched.
        ValueError: if `HF_LIP_TRANSFORMERS_SDIST` names something else, or another version.
    """
    version = transformers.__version__
    cached = cache_folder() / f"transformers-{version}"
    named = os.environ.get(VARIABLE)
    if named is None:
        return cached if version_of(cached) == version else download(version, cached)
    source = Path(named).expanduser()
    if not source.exists():
        raise ValueError(f"{VARIABLE} names {named}, which does not exist.")
    folder = source
    if not source.is_dir():
        # removed with the object, at the end of the process
        state["unpacked"] = tempfile.TemporaryDirectory()
        folder = unpack(source, Path(state["unpacked"].name) / "source")
    if version_of(folder) != version:
        raise ValueError(
            f"{VARIABLE} names version {version_of(folder)} of transformers, but {version} is installed: name the "
            "source distribution of that version."
        )
    return folder


def marker_names(folder: Path) -> list[str]:
    """Names of pytest markers that the tests use."""
    names = set()
    for path in (folder / "tests").rglob("*.py"):
        names |= set(re.findall(r"\bmark\.(\w+)", path.read_text("utf-8")))
    library = Path(transformers.__file__).with_name("testing_utils.py").read_text("utf-8")
    names |= set(re.findall(r"\bmark\.(\w+)", library))
    return sorted(names - {"parametrize", "skip", "skipif", "xfail", "usefixtures", "filterwarnings"})


def stand_in(name: str, **attributes: Any) -> None:
    """A module for what upstream's tests import and the source distribution leaves out."""
    module = ModuleType(name)
    for key, value in attributes.items():
        setattr(module, key, value)
    sys.modules[name] = module


class NoExportTests:
    """In the place of the export tests, where the source distribution leaves them out."""


class NoGenerationTests:
    """In the place of the generation tests, where the source distribution leaves them out."""

    def test_generation_suite(self: Any) -> None:
        self.skipTest(
            "The source distribution of transformers leaves out tests/generation/test_utils.py: set "
            f"{VARIABLE} to a checkout of v{transformers.__version__} to run it."
        )


def import_upstream(name: str) -> ModuleType:
    """Import a mounted module, with the installed transformers where it would load a second copy from its source."""
    with patch.object(transformers.utils, "direct_transformers_import", lambda *args, **kwargs: transformers):
        return importlib.import_module(f"tests.{name}")


def mount(folder: Path) -> SimpleNamespace:
    """Make the tests in `folder` importable beside our own, as `tests.test_modeling_common` and so on, and return the
    mixins. Upstream's modules import one another relatively as well as by the name `tests`."""
    import tests

    tests.__path__.append(str(folder / "tests"))
    for name, attributes in {
        "tests.exporters.test_export": {"ExportTesterMixin": NoExportTests},
        "tests.generation.test_utils": {"GenerationTesterMixin": NoGenerationTests},
    }.items():
        if not (folder / (name.replace(".", "/") + ".py")).is_file():
            stand_in(name, **attributes)
    # upstream's own modules have needs of other tests: the Hub, more packages, images of other models
    stand_in("tests.utils.test_configuration_utils", config_common_kwargs=COMMON_CONFIG_ARGUMENTS)
    stand_in("fetch_hub_objects_for_ci", url_to_local_path=lambda url: url)
    for table, names in OUR_NAMES.items():
        getattr(modeling_auto, table).update(names)
    modules = [import_upstream(name) for name in MODULES]
    return SimpleNamespace(**{name: value for module in modules for name, value in vars(module).items()})


def prepare() -> list[str]:
    """Find and mount the tests, or note why not; the names of the markers they use."""
    try:
        folder = locate()
    except UnavailableError as error:
        state["missing"] = str(error)
        return []
    names = marker_names(folder)
    state["folder"] = folder
    return names


def load() -> SimpleNamespace:
    """Everything that upstream's common test modules define; skips the calling module where they cannot be had."""
    if "missing" in state:
        pytest.skip(state["missing"], allow_module_level=True)
    pytest.importorskip("parameterized", reason="the tests of transformers need it: pip install parameterized")
    if "common" not in state:
        state["common"] = mount(state["folder"])
    return state["common"]
