# SPDX-License-Identifier: Apache-2.0
"""Where `pytest -m conformance` takes the tests of transformers from, and what it says when it cannot have them."""

import io
import tarfile

import pytest
import transformers

from .conformance import upstream


VERSION = transformers.__version__
BACKEND = """
import pathlib
def get_requires_for_build_wheel(config_settings=None):
    return []
def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = pathlib.Path(metadata_directory, "transformers.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: transformers\\nVersion: %s\\n")
    return folder.name
"""


def sdist(folder, version=VERSION, **more):
    """A source distribution of transformers with one test module in it, which pip builds without a network."""
    files = {
        "src/transformers/__init__.py": f'__version__ = "{version}"\n',
        "src/transformers/large.py": "",
        "tests/test_modeling_common.py": "value = 1\n",
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": BACKEND % version,
        "PKG-INFO": f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n",
        **more,
    }
    folder.mkdir(exist_ok=True)
    archive = folder / f"transformers-{version}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"transformers-{version}/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return archive


@pytest.fixture(autouse=True)
def nothing_outside(monkeypatch, tmp_path):
    """No index, an empty cache, no variable, and none of what a real run has mounted."""
    monkeypatch.delenv(upstream.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    monkeypatch.setattr(upstream, "state", {})
    return tmp_path


def test_the_variable_names_an_archive_or_a_folder(monkeypatch, tmp_path):
    archive = sdist(tmp_path / "given")
    monkeypatch.setenv(upstream.VARIABLE, str(archive))
    folder = upstream.locate()
    assert (folder / "tests/test_modeling_common.py").read_text() == "value = 1\n"
    # the package itself is the installed one
    assert not (folder / "src/transformers/large.py").exists()
    monkeypatch.setenv(upstream.VARIABLE, str(folder))
    assert upstream.locate() == folder


def test_pip_fetches_it_once(tmp_path):
    archive = sdist(tmp_path / "links")
    folder = upstream.locate()
    assert folder == tmp_path / "cache" / "hf_lip" / "conformance" / f"transformers-{VERSION}"
    assert upstream.version_of(folder) == VERSION
    archive.unlink()
    assert upstream.locate() == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_without_a_network_the_reason_is_said(tmp_path):
    (tmp_path / "links").mkdir()
    with pytest.raises(upstream.UnavailableError, match=f"pip cannot fetch.*transformers=={VERSION}.*No matching"):
        upstream.locate()
    assert upstream.prepare() == []
    with pytest.raises(pytest.skip.Exception, match=upstream.VARIABLE):
        upstream.load()


@pytest.mark.parametrize("given", ["another version", "missing", "no source distribution"])
def test_what_the_variable_must_not_name(monkeypatch, tmp_path, given):
    if given == "another version":
        named, message = sdist(tmp_path / "old", "4.0.0"), f"version 4.0.0 .*{VERSION} is installed"
    elif given == "missing":
        named, message = tmp_path / "nowhere", "does not exist"
    else:
        named = tmp_path / "other.tar.gz"
        with tarfile.open(named, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("other/readme.txt"))
        message = "no source distribution"
    monkeypatch.setenv(upstream.VARIABLE, str(named))
    with pytest.raises(ValueError, match=message):
        upstream.locate()


def test_markers_of_the_tests_are_known(monkeypatch, tmp_path):
    archive = sdist(tmp_path / "given", **{"tests/test_more.py": "@pytest.mark.very_new_marker\ndef f(): ..."})
    monkeypatch.setenv(upstream.VARIABLE, str(archive))
    names = upstream.prepare()
    assert "very_new_marker" in names
    assert "parametrize" not in names
