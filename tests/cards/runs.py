# SPDX-License-Identifier: Apache-2.0
"""Small runs of the training scripts, and changes to what they leave behind."""

import importlib.util
import json
import shutil
from pathlib import Path

import yaml
from accelerate.state import AcceleratorState, GradientState

from hf_lip.cards import write_card


SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
DIGITS = [
    *("--dataset", "digits", "--cpu", "--depths", "0", "--hidden_sizes", "1", "--pool_size", "1"),
    *("--dense_size", "32", "--num_dense_layers", "2", "--dense_hidden_size", "16", "--num_train_epochs", "3"),
    *("--eval_epochs", "3", "--noise_sd", "0.05"),
]
CHAINS = [
    *("--task", "chains", "--num_state_changes", "1", "3", "--eval_num_state_changes", "4", "5", "--cpu"),
    *("--hidden_size", "16", "--attention", "chained", "--max_steps", "20", "--warmup_steps", "5"),
    *("--eval_samples", "40", "--train_batch_size", "16"),
]
TEXT = [
    *("--tokenizer", "chars", "--block_size", "16", "--hidden_size", "16", "--max_steps", "20", "--warmup_steps", "5"),
    *("--train_batch_size", "8", "--eval_batch_size", "4", "--eval_share", "0.3", "--cpu"),
]


def trained(script, words, folder):
    """Run a training script in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    spec = importlib.util.spec_from_file_location(script, SCRIPTS / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([*words, "--output_dir", str(folder)])
    return folder


def copied(run, tmp_path, **options):
    """A copy of a run with its card."""
    folder = tmp_path / run.name
    shutil.copytree(run, folder)
    write_card(folder, **options)
    return folder


def edit(path, change):
    path.write_text(change(path.read_text()))


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_index(folder, change):
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    metadata = yaml.safe_load(front)
    change(metadata["model-index"][0]["results"][0]["metrics"])
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n{body}")


def insert(folder, name, text):
    edit(folder / "README.md", lambda card: card.replace(f"begin {name} -->\n", f"begin {name} -->\n{text}\n"))
