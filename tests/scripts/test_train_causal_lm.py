# SPDX-License-Identifier: Apache-2.0
"""Runs the real script on made texts: what it learns and writes, converted models, streams, resume, bad input."""

import gzip
import json
import math
import shutil
import signal
import time

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_lip.models.chacal.convert import convert_attention
from hf_lip.training.run_folder import list_checkpoints
from hf_lip.training.sequence_text import byte_tokenizer

from ..hub_endpoint import HubEndpoint, connect
from .runs import weights
from .sequence_runs import finish, run_script, start_script


NAME = "train_causal_lm"
SMALL = [
    *("--hidden_size", 16, "--num_attention_heads", 2, "--block_size", 16, "--train_batch_size", 8),
    *("--warmup_steps", 3, "--max_steps", 12),
]


def sentences(count, seed=0):
    """Sentences of few words, so that a little training tells much."""
    rng = np.random.default_rng(seed)
    names, verbs, things = ("Anna", "Ben", "Caro"), ("takes", "drops", "sees"), ("the key", "a cup", "a map")
    return [" ".join(str(rng.choice(words)) for words in (names, verbs, things)) + "." for _ in range(count)]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "train.txt.gz"
    path.write_bytes(gzip.compress("\n".join(sentences(200)).encode()))
    return path


@pytest.fixture
def folder(tmp_path):
    """A data set in parquet files, of several shards."""
    path = tmp_path / "data"
    path.mkdir()
    for shard in range(2):
        rows = {"text": sentences(40, shard), "id": list(range(40))}
        datasets.Dataset.from_dict(rows).to_parquet(str(path / f"train-{shard}.parquet"))
    datasets.Dataset.from_dict({"text": sentences(10, 9), "id": [0] * 10}).to_parquet(
        str(path / "validation-0.parquet")
    )
    return path


@pytest.fixture
def llama(tmp_path):
    """A tiny saved Llama with a byte tokenizer."""
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": len(tokenizer)}
    LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0)).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # what `datasets` prepares of a local folder stays in the test's own
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run_in(name, *words):
        return run_script(NAME, tmp_path / name, *SMALL, *words)

    return run_in


class TestLearning:
    @pytest.mark.parametrize(
        "words",
        [
            ["--attention", "softmax", "--tokenizer", "chars"],
            ["--layer_types", "full", "chained", "--gamma", 0.5, "--gamma_learnable", "--tokenizer", "bytes"],
            ["--model_type", "gpt2", "--num_hidden_layers", 1],
        ],
        ids=["softmax", "mixed", "gpt2"],
    )
    def test_gzipped_text_lowers_the_perplexity(self, run, text, words):
        options = ["--train_file", text, "--learning_rate", 0.01, "--max_steps", 60, "--eval_steps", 20]
        results = run("run", *options, *words)
        perplexities = [entry["evaluation"]["perplexity"] for entry in results["history"]]
        assert len(perplexities) == 3
        assert perplexities == sorted(perplexities, reverse=True)
        # a uniform guess among the 24 characters in use has 24, one by their frequencies 15
        assert perplexities[-1] < 5
        assert results["evaluation"] == results["history"][-1]["evaluation"]
        if "--gamma_learnable" in words:
            assert len(set(results["gamma"][1])) == 2

    def test_saved_model_has_the_perplexity_in_results(self, run, text, tmp_path):
        other = tmp_path / "other.txt"
        other.write_text("\n".join(sentences(9, 5)), encoding="utf-8")
        results = run("run", "--train_file", text, "--eval_file", other, "--eval_stride", 4, "--gamma", 0.7)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
        ids = torch.tensor([*tokenizer(other.read_text())["input_ids"], tokenizer.eos_token_id])
        nats, predicted = 0.0, 1
        for start in range(0, len(ids) - 1, 4):
            part = ids[start : start + 17]
            with torch.no_grad():
                scores = model(part[None, :-1]).logits[0].double().log_softmax(-1)
            for place in range(predicted, start + len(part)):
                nats -= float(scores[place - start - 1, ids[place]])
            predicted = max(predicted, start + len(part))
        found = results["evaluation"]
        assert found["num_tokens"] == len(ids) - 1
        assert found["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / (len(other.read_text()) - 1), rel=1e-5)
        # from the script too, with weights that do not move
        words = ["--model_name_or_path", tmp_path / "run", "--learning_rate", 1e-30, "--weight_decay", 0]
        again = run_script(
            *(
                NAME,
                tmp_path / "again",
                "--train_file",
                text,
                "--eval_file",
                other,
                "--eval_stride",
                4,
                "--max_steps",
                1,
            ),
            *("--block_size", 16, "--train_batch_size", 8, *words),
        )
        assert again["evaluation"] == found

    def test_the_first_tokens_of_the_evaluation(self, run, text):
        results = run("run", "--train_file", text, "--max_eval_tokens", 50, "--max_steps", 1)
        assert results["evaluation"]["num_tokens"] == 49

    def test_push_sends_the_finished_run(self, text, tmp_path, monkeypatch):
        with HubEndpoint() as hub:
            connect(monkeypatch, hub, hub.token)
            run_script(NAME, tmp_path / "text", *SMALL, "--train_file", text, "--max_steps", 1, "--push_to_hub")
            files = hub.find("owner/text").files
        assert {"config.json", "model.safetensors", "tokenizer.json", "results.json"} <= set(files)


class TestConverted:
    def words(self, folder, text):
        kept = ["--block_size", 16, "--train_batch_size", 8, "--train_file", text, "--learning_rate", 0.005]
        return ["--model_name_or_path", folder, *kept]

    def test_a_converted_llama_trains_while_its_discount_rises(self, llama, text, tmp_path):
        convert_attention(llama, tmp_path / "chained")
        words = [*self.words(tmp_path / "chained", text), "--max_steps", 30, "--eval_steps", 10]
        results = run_script(NAME, tmp_path / "run", *words, "--gamma", 0.6, "--gamma_warmup_steps", 20)
        perplexities = [entry["evaluation"]["perplexity"] for entry in results["history"]]
        assert perplexities == sorted(perplexities, reverse=True)
        assert results["model_type"] == "chacal_llama"
        assert results["gamma"] == [[0.6] * 4] * 2
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
        assert model.config.chain_gamma == [0.6, 0.6]

    def test_at_gamma_0_it_trains_as_the_original(self, llama, text, tmp_path):
        convert_attention(llama, tmp_path / "chained")
        found = [
            run_script(NAME, tmp_path / f"run-{folder.name}", *self.words(folder, text), "--max_steps", 5)
            for folder in (llama, tmp_path / "chained")
        ]
        assert found[0]["evaluation"]["loss"] == pytest.approx(found[1]["evaluation"]["loss"], rel=1e-4)
        assert found[0]["gamma"] is None

    def test_resume_in_the_middle_of_the_rise(self, llama, text, tmp_path):
        convert_attention(llama, tmp_path / "chained")
        words = [*self.words(tmp_path / "chained", text), "--max_steps", 8, "--gamma", 0.6, "--gamma_warmup_steps", 6]
        words += ["--checkpointing_steps", 4, "--eval_steps", 4]
        whole = run_script(NAME, tmp_path / "whole", *words)
        shutil.copytree(tmp_path / "whole", tmp_path / "part")
        shutil.rmtree(tmp_path / "part" / "checkpoint-8")
        part = run_script(NAME, tmp_path / "part", *words, "--resume_from_checkpoint", "latest")
        assert part["evaluation"] == whole["evaluation"]
        assert weights(tmp_path / "part") == weights(tmp_path / "whole")
        # nothing left to train: evaluated again, with the discount of the end
        again = run_script(
            NAME, tmp_path / "part", *words, "--resume_from_checkpoint", "latest", "--eval_batch_size", 3
        )
        assert again["evaluation"]["loss"] == pytest.approx(whole["evaluation"]["loss"], rel=1e-6)
        assert again["gamma"] == [[0.6] * 4] * 2

    def test_an_ordinary_checkpoint_has_no_discount(self, llama, text, tmp_path):
        with pytest.raises(ValueError, match=r"convert it with --attention chained, or .* `hf-lip convert-attention`"):
            run_script(NAME, tmp_path / "run", *self.words(llama, text), "--gamma", 0.5)

    def test_learnt_discounts_start_at_zero_and_move(self, llama, text, tmp_path):
        """The same run of a checkpoint converted before, with learnt discounts or without, and of one in the run."""
        convert_attention(llama, tmp_path / "fixed")
        convert_attention(llama, tmp_path / "learnable", gamma_learnable=True)
        options = {
            "fixed": ["--gamma", 0, "--gamma_learnable"],
            "learnable": [],
            "llama": ["--attention", "chained", "--gamma", 0, "--gamma_learnable"],
        }
        found = {}
        for name, words in options.items():
            words = [*self.words(tmp_path / name, text), "--max_steps", 12, "--checkpointing_steps", 6, *words]
            found[name] = run_script(NAME, tmp_path / f"run-{name}", *words)
            assert found[name]["model_type"] == "chacal_llama"
            assert weights(tmp_path / f"run-{name}") == weights(tmp_path / "run-fixed")
        spread = torch.tensor(found["llama"]["gamma"])
        assert spread.shape == (2, 4)
        assert (spread != 0).all()
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run-llama")
        torch.testing.assert_close(torch.tensor(model.get_gamma()), spread)
        shutil.rmtree(tmp_path / "run-llama" / "checkpoint-12")
        run_script(NAME, tmp_path / "run-llama", *words, "--resume_from_checkpoint", "latest")
        assert weights(tmp_path / "run-llama") == weights(tmp_path / "run-fixed")


class TestDataSets:
    def test_in_memory(self, run, folder):
        results = run("run", "--dataset", folder)
        expected = sum(len(sentence) + 1 for sentence in sentences(10, 9)) - 1
        assert results["evaluation"]["num_tokens"] == expected
        assert results["train_tokens_seen"] == 12 * 8 * 16

    @pytest.mark.parametrize("buffer", [0, 20])
    def test_a_stream_resumes_where_it_was(self, run, folder, tmp_path, buffer):
        words = ["--dataset", folder, "--streaming", "--shuffle_buffer", buffer, "--checkpointing_steps", 4]
        words += ["--eval_steps", 6, "--checkpoints_total_limit", 9]
        expected = run("whole", *words)
        state = json.loads((tmp_path / "whole" / "checkpoint-12" / "training_state.json").read_text())["state"]
        # 12 steps of 8 blocks of 16 tokens have read 80 documents of about 17 tokens, and again
        assert state["position"]["epoch"] == 1
        for step in (4, 8):
            copy = tmp_path / f"from-{step}"
            shutil.copytree(tmp_path / "whole", copy)
            for path in list_checkpoints(copy):
                if int(path.name.split("-")[1]) > step:
                    shutil.rmtree(path)
            results = run(copy.name, *words, "--resume_from_checkpoint", "latest")
            assert weights(copy) == weights(tmp_path / "whole")
            assert results["evaluation"] == expected["evaluation"]

    def test_a_stream_has_the_text_of_the_data_set(self, run, folder):
        stream = run("stream", "--dataset", folder, "--streaming", "--max_eval_tokens", 60)
        memory = run("memory", "--dataset", folder, "--max_eval_tokens", 60, "--max_steps", 1)
        assert stream["evaluation"]["num_tokens"] == memory["evaluation"]["num_tokens"] == 59


class TestProcesses:
    @pytest.mark.parametrize("streaming", [False, True], ids=["file", "stream"])
    def test_two_processes_train_as_one(self, run, text, folder, tmp_path, streaming):
        words = ["--dataset", folder, "--streaming"] if streaming else ["--train_file", text, "--eval_batch_size", 3]
        finish(start_script(NAME, tmp_path / "two", *SMALL, *words, processes=2))
        two, one = json.loads((tmp_path / "two" / "results.json").read_text()), run("one", *words)
        assert (two["num_processes"], one["num_processes"]) == (2, 1)
        for name, value in one["evaluation"].items():
            assert two["evaluation"][name] == pytest.approx(value, rel=1e-4)
        expected = load_file(tmp_path / "one" / "model.safetensors")
        for name, tensor in load_file(tmp_path / "two" / "model.safetensors").items():
            torch.testing.assert_close(tensor, expected[name], rtol=2e-2, atol=2e-3)

    def test_kill_9_then_resume_gives_bit_identical_weights(self, text, tmp_path):
        words = [*SMALL, "--train_file", text, "--checkpointing_steps", 5, "--max_steps", 60]
        whole, killed = (start_script(NAME, tmp_path / name, *words) for name in ("whole", "killed"))
        try:
            deadline = time.monotonic() + 500
            while not any(int(path.name.split("-")[1]) >= 15 for path in list_checkpoints(tmp_path / "killed")):
                assert killed.poll() is None, killed.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.005)
            killed.send_signal(signal.SIGKILL)
            assert killed.wait() == -signal.SIGKILL
            resumed = start_script(NAME, tmp_path / "killed", *words, "--resume_from_checkpoint", "latest")
            for process in (whole, resumed):
                finish(process)
        finally:
            for process in (whole, killed):
                process.kill()
        assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


class TestBadInput:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "either --train_file or --dataset"),
            (["--dataset", "x", "--streaming", "--num_train_epochs", 2], "exclude each other"),
            (["--train_file", "x", "--block_size", 0], "--block_size must be > 0"),
            (["--train_file", "x", "--eval_stride", 99], "tokens would be left out"),
        ],
    )
    def test_arguments_are_refused_before_any_work(self, run, capsys, tmp_path, words, message):
        with pytest.raises(SystemExit) as exit_info:
            run("run", *words)
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    def test_epochs_of_a_stream_are_refused(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            run_script(NAME, tmp_path / "run", "--dataset", "x", "--streaming", "--num_train_epochs", 2)
        assert "give --max_steps with --streaming" in capsys.readouterr().err

    def test_empty_and_short_texts_are_refused(self, run, text, tmp_path):
        (tmp_path / "empty.txt").write_text("\n")
        (tmp_path / "short.txt").write_text("abc")
        with pytest.raises(FileNotFoundError, match=r"none.txt' does not exist"):
            run("run", "--train_file", tmp_path / "none.txt")
        with pytest.raises(ValueError, match=r"empty.txt' is empty"):
            run("run", "--train_file", tmp_path / "empty.txt")
        with pytest.raises(ValueError, match=r"empty.txt' is empty"):
            run("run", "--train_file", text, "--eval_file", tmp_path / "empty.txt")
        with pytest.raises(ValueError, match="--train_batch_size is 8 blocks of --block_size 16"):
            run("run", "--train_file", tmp_path / "short.txt", "--eval_file", text)
        with pytest.raises(ValueError, match="--eval_share leaves no text"):
            run("run", "--train_file", tmp_path / "short.txt", "--eval_share", 0.001)
        with pytest.raises(ValueError, match="has 1 tokens, and two are needed"):
            run("run", "--train_file", text, "--max_eval_tokens", 1)

    def test_characters_that_the_training_text_has_not_are_named(self, run, text, tmp_path):
        (tmp_path / "eval.txt").write_text("Anna sees a €.")
        with pytest.raises(ValueError, match=r"--eval_file has characters .*'€'. Use --tokenizer bytes"):
            run("run", "--train_file", text, "--eval_file", tmp_path / "eval.txt", "--tokenizer", "chars")

    def test_blocks_longer_than_the_positions_are_refused(self, run, text):
        with pytest.raises(ValueError, match="has 16 tokens and --max_position_embeddings gives 8 positions"):
            run("run", "--train_file", text, "--max_position_embeddings", 8)

    def test_data_sets_without_texts_are_refused(self, run, folder, tmp_path):
        with pytest.raises(ValueError, match="--text_column 'story' is no column of --dataset"):
            run("run", "--dataset", folder, "--text_column", "story")
        with pytest.raises(ValueError, match="split 'nothing'"):
            run("run", "--dataset", folder, "--eval_split", "nothing")
        (tmp_path / "numbers").mkdir()
        for split in ("train", "validation"):
            rows = datasets.Dataset.from_dict({"id": [1, 2], "size": [3, 4]})
            rows.to_parquet(str(tmp_path / "numbers" / f"{split}-0.parquet"))
        for streaming in ([], ["--streaming"]):
            with pytest.raises(ValueError, match="no one column of texts"):
                run("run", "--dataset", tmp_path / "numbers", *streaming)
        (tmp_path / "blank").mkdir()
        for split in ("train", "validation"):
            datasets.Dataset.from_dict({"text": ["", ""]}).to_parquet(str(tmp_path / "blank" / f"{split}-0.parquet"))
        with pytest.raises(ValueError, match="has no text in its split 'train'"):
            run("run", "--dataset", tmp_path / "blank")

    def test_divergence_stops_the_run(self, run, text, tmp_path):
        words = ("--learning_rate", 1e38, "--lr_schedule", "constant", "--warmup_steps", 0)
        with pytest.raises(RuntimeError, match="has diverged"):
            run("run", "--train_file", text, *words, "--logging_steps", 1, "--checkpointing_steps", 1)
        for checkpoint in list_checkpoints(tmp_path / "run"):
            assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())
