# SPDX-License-Identifier: Apache-2.0
"""The released models in model_cards/: cards, results and certificates are of the weights beside them."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from transformers import AutoConfig

import hf_lip
from hf_lip.assets import DEFAULT_MODEL_DIR
from hf_lip.cards import check_card
from hf_lip.checkpoints.stored_weights import stored_weights_sha256


ROOT = Path(hf_lip.__file__).resolve().parents[1]
CARDS = ROOT / "model_cards"
FOLDERS = sorted(path for path in CARDS.iterdir() if path.is_dir()) if CARDS.is_dir() else []
EMBEDDED = CARDS / "lipschitz-digits-sll"
MEGABYTE = 1_000_000
TEXTS = (".md", ".json", ".jsonl", ".tsv", ".txt", ".yaml", ".yml", ".py")
# at least two parts, not behind a word, a dot, a colon ("https://") or a closing bracket
MACHINE_PATH = re.compile(
    r"(?<![\w.:/)\]}>-])/(?!/)[A-Za-z_][\w.@+-]*(?:/[\w.@+-]+)+|(?<![\w/])~/\w|\b[A-Za-z]:\\\\?\w|\bfile://"
)
# what cannot be verified in a second
LARGE = 500_000

pytestmark = pytest.mark.skipif(not FOLDERS, reason="the model cards are not part of the package")
each = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def size_of_weights(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def machine_paths(folder):
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in TEXTS:
            text = path.read_text(encoding="utf-8")
            found += [f"{path.relative_to(folder)}: {match[0]}" for match in MACHINE_PATH.finditer(text)]
    return found


@each
def test_the_card_states_what_the_files_state(folder):
    check = check_card(folder, rerun=False, verify=False)
    assert check.ok, check.problems
    # not by hand
    assert "<!-- hf_lip:generated sha256=" in (folder / "README.md").read_text()
    assert not any("changed by hand" in note for note in check.notes), check.notes


@each
def test_results_are_of_these_weights_and_say_where_they_were_made(folder):
    results = json.loads((folder / "results.json").read_text())
    assert results["weights_sha256"] == stored_weights_sha256(folder)
    assert results["command"]
    assert results["seconds"] > 0
    assert results["cpu_seconds"] > 0
    assert {"cpu", "gpu", "cores", "torch_threads", "dtype"} <= set(results["hardware"])
    assert {"python", "torch", "transformers", "hf_lip"} <= set(results["versions"])


@each
def test_a_folder_holds_a_model_and_nothing_private(folder):
    config = AutoConfig.from_pretrained(folder)
    assert config.architectures
    assert config.model_type == json.loads((folder / "config.json").read_text())["model_type"]
    assert machine_paths(folder) == []
    names = {path.name for path in folder.rglob("*")}
    assert not {name for name in names if name.startswith((".", "checkpoint-", "events.out"))}
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".log"))}
    if config.model_type == "lipschitz_vision":
        assert "lipschitz_certificate.json" in names


@pytest.mark.parametrize(
    "folder",
    [
        pytest.param(folder, id=folder.name, marks=[pytest.mark.slow] if size_of_weights(folder) > LARGE else [])
        for folder in FOLDERS
        if (folder / "lipschitz_certificate.json").is_file()
    ],
)
def test_certificates_hold(folder):
    report = hf_lip.verify_checkpoint(folder)
    assert report.ok, report.reasons


def test_the_code_on_the_boxes_card_answers(monkeypatch, capsys):
    monkeypatch.chdir(CARDS)
    code = (CARDS / "chacal-boxes" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    exec(code.replace("path/to/", "./"), {})
    assert capsys.readouterr().out.strip() == "contains the key"


def test_sizes():
    sizes = {folder.name: size_of_weights(folder) for folder in FOLDERS}
    assert all(0 < size < 8 * MEGABYTE for size in sizes.values()), sizes
    assert sum(sizes.values()) < 30 * MEGABYTE, sizes


def test_the_table_names_every_model():
    text = (CARDS / "README.md").read_text()
    assert set(re.findall(r"^\| \[([\w.-]+)\]\(\1\) \|", text, re.MULTILINE)) == {folder.name for folder in FOLDERS}
    assert not MACHINE_PATH.search(text)


def test_the_embedded_model_is_the_released_one():
    for name in ("config.json", "lipschitz_certificate.json", "model.safetensors", "results.json"):
        assert (EMBEDDED / name).read_bytes() == (DEFAULT_MODEL_DIR / name).read_bytes(), name
    assert machine_paths(DEFAULT_MODEL_DIR) == []


PATHS = ('"/srv/me/data"', "--out /mnt/runs/x", "`/opt/.cache`", "~/data", r"C:\Users\me", "file:///tmp/a", "=/a/b")
NO_PATHS = ("36/255", "n0 / n", "https://huggingface.co/a/b", "a/b/c", "[x](../y/z)", "1 / std", "./a/b", "l2, 2/3/4")


@pytest.mark.parametrize("text", PATHS)
def test_what_is_taken_for_a_path_of_a_machine(text):
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", NO_PATHS)
def test_what_is_not(text):
    assert not MACHINE_PATH.search(text)


def test_packages_ship_no_released_weights():
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert hatch["wheel"]["packages"] == ["hf_lip"]
    assert "/model_cards" in hatch["sdist"]["exclude"]
