# SPDX-License-Identifier: Apache-2.0
"""Runs the real script on small tasks: what it learns and writes, resume, several processes, bad input."""

import gzip
import json
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_lip.checkpoints.stored_weights import stored_weights_sha256
from hf_lip.data import BoxesTask, ChainsTask, TrackingCollator, embed_statements, tracking_dataset, tracking_tokenizer
from hf_lip.tracking_metrics import exact_match_by_depth, predicted_tokens
from hf_lip.training import sequence_pace
from hf_lip.training.run_folder import list_checkpoints, unfinished_folder

from ..hub_endpoint import HubEndpoint, connect
from .runs import weights
from .sequence_runs import finish, run_script, start_script


NAME = "train_entity_tracking"
CHAINS = [
    *("--task", "chains", "--num_state_changes", 1, 3, "--num_values", 4, "--hidden_size", 32),
    *("--train_batch_size", 16, "--eval_samples", 16, "--warmup_steps", 4, "--initializer_range", 0.1),
]
SHORT = [*CHAINS, "--layer_types", "full", "chained", "--num_attention_heads", 2, "--max_steps", 12]
BOXES = [
    *("--task", "boxes", "--num_boxes", 2, "--max_objects", 2, "--num_operations", 2, "--hidden_size", 32),
    *("--layer_types", "full", "chained", "--train_batch_size", 4, "--questions_per_text", 3, "--eval_samples", 4),
    *("--max_steps", 6, "--warmup_steps", 2),
]
# every stage is learnt at once, long before its time
LEARNING = [*SHORT, "--curriculum", "grow", "--curriculum_loss", 100]
LEARNING += ["--curriculum_share", 1.0, "--curriculum_power", 10]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run_in(name, *words, base=SHORT):
        return run_script(NAME, tmp_path / name, *base, *words)

    return run_in


def boxes_file(path, worlds, *, task=None, **options):
    """Made worlds in the layout of the Boxes release."""
    lines = []
    for row in tracking_dataset(task or BoxesTask(num_boxes=3, num_operations=3), worlds, **options):
        text = f"{row['prompt']} {row['answer']}."
        masked = {
            "sentence_masked": f"{row['prompt']} <extra_id_0> .",
            "masked_content": f"<extra_id_0> {row['answer']}",
        }
        kept = {name: row[name] for name in ("sample_id", "numops", "numops_by_op")}
        lines.append(json.dumps({"sentence": text, **masked, **kept}))
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


class TestLearning:
    recipe = ("--learning_rate", 0.005, "--max_steps", 150, "--train_batch_size", 32)

    def test_one_chained_layer_follows_what_one_softmax_layer_can_not(self, run):
        chained = run("chained", *self.recipe, "--attention", "chained", "--gamma", 0.9, base=CHAINS)
        softmax = run("softmax", *self.recipe, "--attention", "softmax", base=CHAINS)
        scores, others = (found["evaluations"]["test"]["by_hops"] for found in (chained, softmax))
        assert min(score["accuracy"] for score in scores.values()) > 0.95
        assert others["0"]["accuracy"] > 0.95
        # two entities: one in two is right by chance
        assert max(others[hops]["accuracy"] for hops in ("2", "3")) < 0.75
        assert [scores[hops]["minimal_layers"] for hops in "0123"] == [0, 1, 2, 2]
        assert chained["num_parameters"] == softmax["num_parameters"]

    @pytest.mark.parametrize(
        "words",
        [
            [],
            ["--curriculum", "grow", "--curriculum_power", 2, "--rename_objects", "--changed_weight", 3],
            ["--answer_order", "text"],
        ],
        ids=["plain", "growing", "text order"],
    )
    def test_boxes_from_files(self, run, tmp_path, words):
        train = boxes_file(tmp_path / "train-t5.jsonl.gz", 24)
        dev = boxes_file(tmp_path / "dev-t5.jsonl.gz", 3, split="validation")
        test = boxes_file(tmp_path / "test-t5.jsonl.gz", 2, split="test")
        files = ["--boxes_train", train, "--boxes_eval", dev, test, "--hidden_size", 32, "--learning_rate", 0.01]
        base = ["--task", "boxes", "--layer_types", "full", "chained", "--num_attention_heads", 2, *files, *words]
        results = run(
            *("run", "--num_train_epochs", 6, "--train_batch_size", 8, "--eval_steps", 9, "--warmup_steps", 3),
            *("--questions_per_text", 4, "--eval_generate"),
            base=base,
        )
        assert results["steps"] == 18
        assert set(results["evaluations"]) == {"dev-t5", "test-t5"}
        assert results["evaluations"]["dev-t5"]["num_examples"] == 3 * 4 * 3
        assert results["evaluations"]["test-t5"]["num_states"] == 2 * 4
        first, last = results["history"]
        assert last["loss"] < first["loss"]
        assert set(results["evaluations"]["dev-t5"]) >= {"by_numops", "by_implicit_hops", "whole_state_accuracy"}
        assert json.loads((tmp_path / "run" / "results.json").read_text())["task"] == "boxes"

    @pytest.mark.parametrize(
        "words",
        [
            ["--task", "random_chains", "--num_statements", 6, "--eval_num_statements", 8],
            [
                "--task",
                "permutations",
                "--num_state_changes",
                1,
                3,
                "--eval_num_state_changes",
                4,
                "--num_elements",
                3,
            ],
            ["--task", "permutations", "--form", "text", "--num_state_changes", 2, 4, "--model_type", "llama"],
            ["--task", "chains", "--form", "text", "--num_state_changes", 1, 3, "--mixed_precision", "bf16"],
            [
                "--task",
                "chains",
                "--num_state_changes",
                1,
                9,
                "--curriculum",
                "log",
                "--gamma_warmup_steps",
                2,
                "--gamma",
                0.9,
            ],
            ["--task", "boxes", "--boxes_operations", "contents=1", "--num_operations", 2, "--eval_num_operations", 3],
            ["--task", "boxes", "--num_operations", 1, "--questions_per_text", 0],
        ],
        ids=["random", "permutations", "llama", "bf16", "curriculum", "contents", "rows"],
    )
    def test_other_tasks(self, run, tmp_path, words):
        sizes = ["--train_batch_size", 8, "--eval_samples", 5, "--max_steps", 3, "--hidden_size", 16]
        results = run("run", *sizes, "--report_to", "tensorboard", "--logging_steps", 1, base=words)
        assert 0 <= results["evaluations"]["test"]["accuracy"] <= 1
        assert ("extrapolation" in results["evaluations"]) == any("eval_num" in str(word) for word in words)
        assert list((tmp_path / "run" / "logs").rglob("events.out.tfevents*"))

    @pytest.mark.parametrize("task", ["babi", "propara"])
    def test_babi_and_propara_files(self, run, tmp_path, task):
        story = (
            "1 Mary went to the hall.\n2 Where is Mary?\thall\t1\n3 John took the ball.\n4 Where is John?\tden\t3\n"
        )
        grid = {
            **{"para_id": "1", "sentence_texts": ["Water rises.", "It falls."], "participants": ["water", "rain"]},
            "states": [["sea", "sky", "sea"], ["-", "sky", "-"]],
        }
        for split, other in (("train", "train"), ("test", "valid")):
            (tmp_path / f"qa1_single_{split}.txt").write_text(story * 2)
            (tmp_path / f"grids.{other}.jsonl").write_text("\n".join(json.dumps({**grid, "para_id": n}) for n in "12"))
        words = ["--babi_task", 1] if task == "babi" else ["--eval_split", "validation"]
        results = run(
            *("run", "--train_batch_size", 2, "--num_train_epochs", 2, "--hidden_size", 16, *words),
            base=["--task", task, "--data_path", tmp_path],
        )
        found = results["evaluations"]["test" if task == "babi" else "validation"]
        assert found["num_examples"] == (4 if task == "babi" else 12)
        assert set(found) & {"by_num_supporting_facts", "by_num_state_changes"}
        assert results["arguments"]["data_path"] == tmp_path.name
        assert str(tmp_path.parent) not in (tmp_path / "run" / "results.json").read_text()


class TestWhatARunWrites:
    def test_saved_model_reproduces_the_figures_in_results(self, run, tmp_path):
        results = run("run", "--eval_steps", 6, "--hub_token", "hf_secret", "--eval_num_state_changes", 4)
        folder = tmp_path / "run"
        assert {path.name for path in folder.iterdir()} == {
            *("config.json", "generation_config.json", "model.safetensors", "results.json"),
            *("tokenizer.json", "tokenizer_config.json"),
        }
        assert "hf_secret" not in (folder / "results.json").read_text()
        assert [entry["step"] for entry in results["history"]] == [6, 12]
        assert results["history"][-1]["evaluations"] == results["evaluations"]
        assert results["train_samples_seen"] == 12 * 16
        assert results["arguments"]["num_state_changes"] == [1, 3]
        assert results["weights_sha256"] == stored_weights_sha256(folder)
        assert results["hardware"]["torch_threads"] == torch.get_num_threads()
        assert "hf_lip" in results["versions"]
        assert results["seconds"] >= results["history"][-1]["seconds"] > 0
        assert results["cpu_seconds"] > 0

        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        task = ChainsTask(num_entities=2, num_state_changes=(1, 3), num_values=4, num_variables=10)
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == tracking_tokenizer(task.vocabulary()).get_vocab()
        batch = TrackingCollator()(list(tracking_dataset(task, 16, "test")))
        with torch.no_grad():
            embeds = embed_statements(model.get_input_embeddings(), batch["statement_ids"])
            guesses = predicted_tokens(model(inputs_embeds=embeds).logits)
        expected = exact_match_by_depth(guesses, batch["labels"], batch["hops"])
        found = results["evaluations"]["test"]["by_hops"]
        assert {int(hops): (score["accuracy"], score["num_examples"]) for hops, score in found.items()} == {
            hops: (pytest.approx(score.accuracy), score.num_examples) for hops, score in expected.items()
        }
        # the same figures from the script, with weights that do not move
        words = ["--model_name_or_path", folder, "--learning_rate", 1e-30, "--weight_decay", 0, "--max_steps", 1]
        base = ["--task", "chains", "--num_state_changes", 1, 3, "--num_values", 4, "--eval_num_state_changes", 4]
        again = run("again", *words, "--eval_samples", 16, "--train_batch_size", 4, base=base)
        assert again["evaluations"] == results["evaluations"]

    def test_micro_batches_change_nothing_but_rounding(self, run, tmp_path):
        one, four = run("one"), run("four", "--gradient_accumulation_steps", 4)
        assert one["train_tokens_seen"] == four["train_tokens_seen"]
        assert four["history"][0]["loss"] == pytest.approx(one["history"][0]["loss"], rel=1e-5)
        expected = load_file(tmp_path / "one" / "model.safetensors")
        for name, tensor in load_file(tmp_path / "four" / "model.safetensors").items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=1e-3)

    def test_discounts_have_a_rate_of_their_own(self, run):
        words = ["--gamma", 0.5, "--gamma_learnable", "--learning_rate", 1e-30, "--warmup_steps", 0]
        (same,) = run("same", *words)["gamma"][1:]
        assert same == pytest.approx([0.5, 0.5], abs=1e-6)
        (moved,) = run("moved", *words, "--gamma_learning_rate", 0.01)["gamma"][1:]
        assert all(0.005 < abs(gamma - 0.5) < 0.12 for gamma in moved)

    def test_push_sends_the_finished_run(self, tmp_path, monkeypatch):
        with HubEndpoint() as hub:
            connect(monkeypatch, hub, hub.token)
            run_script(NAME, tmp_path / "chains", *SHORT, "--checkpointing_steps", 6, "--push_to_hub")
            files = hub.find("owner/chains").files
            assert {"config.json", "model.safetensors", "tokenizer.json", "results.json"} <= set(files)
            assert not any("checkpoint" in name or "optimizer" in name for name in files)
            assert files["model.safetensors"] == weights(tmp_path / "chains")


class TestResume:
    @pytest.mark.parametrize("base", [SHORT, BOXES, LEARNING], ids=["chains", "boxes", "pace"])
    def test_from_any_checkpoint_the_weights_are_the_same(self, run, tmp_path, monkeypatch, base):
        monkeypatch.setattr(sequence_pace, "LEAST_STEPS", 2)
        words = ("--checkpointing_steps", 2, "--eval_steps", 3, "--checkpoints_total_limit", 9)
        words = (*words, "--config_overrides", "residual_dropout=0.1", "--gradient_accumulation_steps", 2)
        words = (*words, "--tie_word_embeddings", "--gamma_learnable")
        if base is BOXES:
            words = (*words, "--muon_learning_rate", 0.01)
        expected = run("whole", *words, base=base)
        steps = expected["steps"]
        learnt = expected["curriculum_steps"]
        assert (learnt is None) if base is not LEARNING else (learnt[:5] == [2, 4, 6, 8, 10])
        for step in (2, steps - 2):
            copy = tmp_path / f"from-{step}"
            shutil.copytree(tmp_path / "whole", copy)
            for path in list_checkpoints(copy):
                if int(path.name.split("-")[1]) > step:
                    shutil.rmtree(path)
            (copy / "model.safetensors").unlink()
            # a save that was killed
            unfinished_folder(copy, step + 2).mkdir()
            (unfinished_folder(copy, step + 2) / "model.safetensors").write_bytes(b"half")
            results = run(f"from-{step}", *words, "--resume_from_checkpoint", "latest", base=base)
            assert weights(copy) == weights(tmp_path / "whole")
            assert results["evaluations"] == expected["evaluations"]
            assert results["curriculum_steps"] == expected["curriculum_steps"]
            for before, after in zip(expected["history"], results["history"], strict=True):
                assert {**before, "seconds": 0} == {**after, "seconds": 0}
            assert not unfinished_folder(copy, step + 2).exists()
        assert {path.suffix for path in (tmp_path / "whole").rglob("*") if path.is_file()} == {".json", ".safetensors"}

    def test_time_limit_saves_and_the_run_goes_on_later(self, run, tmp_path):
        run("whole")
        stopped = run("stopped", "--max_train_seconds", 1e-9)
        assert stopped["stopped_early"]
        assert stopped["steps"] == 0
        resumed = run("stopped", "--resume_from_checkpoint", "latest", "--num_workers", 1)
        assert not resumed["stopped_early"]
        assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")

    def test_kill_9_then_resume_gives_bit_identical_weights(self, tmp_path):
        words = [*SHORT, "--checkpointing_steps", 5, "--max_steps", 60]
        whole, killed = (start_script(NAME, tmp_path / name, *words) for name in ("whole", "killed"))
        try:
            deadline = time.monotonic() + 500
            while not any(int(path.name.split("-")[1]) >= 15 for path in list_checkpoints(tmp_path / "killed")):
                assert killed.poll() is None, killed.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.005)
            killed.send_signal(signal.SIGKILL)
            assert killed.wait() == -signal.SIGKILL
            assert not (tmp_path / "killed" / "model.safetensors").exists()
            resumed = start_script(NAME, tmp_path / "killed", *words, "--resume_from_checkpoint", "latest")
            for process in (whole, resumed):
                finish(process)
        finally:
            for process in (whole, killed):
                process.kill()
        assert weights(tmp_path / "killed") == weights(tmp_path / "whole")

    def test_other_arguments_are_refused(self, run):
        run("run", "--max_steps", 2, "--checkpointing_steps", 1)
        with pytest.raises(ValueError, match=r"other arguments; resume it with \{'learning_rate': 0.002\}"):
            run("run", "--max_steps", 2, "--resume_from_checkpoint", "latest", "--learning_rate", 0.02)

    def test_overwriting_deletes_the_checkpoints_of_the_earlier_run(self, run, tmp_path):
        run("run", "--max_steps", 4, "--checkpointing_steps", 2)
        run("run", "--max_steps", 2, "--checkpointing_steps", 1, "--overwrite_output_dir")
        assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-2"]


class TestProcesses:
    def test_two_processes_train_as_one(self, run, tmp_path):
        words = ["--eval_steps", 6, "--learning_rate", 0.01]
        finish(start_script(NAME, tmp_path / "two", *SHORT, *words, processes=2))
        two, one = json.loads((tmp_path / "two" / "results.json").read_text()), run("one", *words)
        assert (two["num_processes"], one["num_processes"]) == (2, 1)
        assert two["train_tokens_seen"] == one["train_tokens_seen"]
        for entry, reference in zip(two["history"], one["history"], strict=True):
            assert entry["loss"] == pytest.approx(reference["loss"], rel=1e-4)
            found, expected = (part["evaluations"]["test"] for part in (entry, reference))
            assert [score["num_examples"] for score in found["by_hops"].values()] == [
                score["num_examples"] for score in expected["by_hops"].values()
            ]
            assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=0.03)
        expected = load_file(tmp_path / "one" / "model.safetensors")
        for name, tensor in load_file(tmp_path / "two" / "model.safetensors").items():
            torch.testing.assert_close(tensor, expected[name], rtol=2e-2, atol=2e-3)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="CPU launch")
    def test_processes_that_would_train_alone_are_refused(self, tmp_path, monkeypatch):
        from hf_lip.training.sequence_arguments import SequenceTrainingArguments
        from hf_lip.training.sequence_run import start_accelerator

        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(RuntimeError, match="2 processes were launched but each would train alone"):
            start_accelerator(SequenceTrainingArguments(output_dir=str(tmp_path)))


class TestBadInput:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--task", "riddles"], "argument --task"),
            (["--num_boxes", 3], "--num_boxes is no option of --task chains"),
            (["--num_state_changes", 5, 1], "--num_state_changes must be"),
            (["--num_train_epochs", 2, "--max_steps", 3], "exclude each other"),
            (["--resume_from_checkpoint", "latest"], "no whole checkpoint"),
            (
                ["--curriculum", "grow", "--curriculum_loss", 1, "--num_workers", 1],
                "--num_workers makes batches ahead",
            ),
            (["--report_to", "wandb"], "needs a package: pip install wandb"),
            (["--layer_types", "wide"], "--layer_types must be words of"),
            (["--no_such_argument", 1], "no_such_argument"),
        ],
    )
    def test_arguments_are_refused_before_any_work(self, run, capsys, tmp_path, words, message):
        with pytest.raises(SystemExit) as exit_info:
            run("run", *words, base=CHAINS)
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    def test_epochs_of_generated_samples_are_refused(self, run, capsys):
        with pytest.raises(SystemExit):
            run("run", "--num_train_epochs", 2, base=CHAINS)
        assert "give --max_steps for generated samples" in capsys.readouterr().err

    def test_a_full_output_dir_is_refused(self, run, capsys, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "notes.txt").write_text("mine")
        with pytest.raises(SystemExit):
            run("run")
        assert "is not empty" in capsys.readouterr().err

    def test_a_push_needs_a_token(self, run, monkeypatch, capsys):
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent")
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(SystemExit):
            run("run", "--push_to_hub")
        assert "--push_to_hub needs a token" in capsys.readouterr().err

    def test_a_batch_that_can_not_be_divided_is_refused(self, run):
        with pytest.raises(ValueError, match="--train_batch_size must be a multiple of 3"):
            run("run", "--gradient_accumulation_steps", 3)

    def test_files_are_checked(self, run, tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            run("run", "--boxes_train", tmp_path / "none.jsonl", "--boxes_eval", "x", base=["--task", "boxes"])
        train = boxes_file(tmp_path / "train-t5.jsonl.gz", 2)
        (tmp_path / "dev.jsonl").write_text("")
        with pytest.raises(ValueError, match="is empty"):
            run("run", "--boxes_train", train, "--boxes_eval", tmp_path / "dev.jsonl", base=["--task", "boxes"])
        with pytest.raises(ValueError, match="--train_batch_size is 64, more than the 2 samples"):
            run("run", "--boxes_train", train, "--boxes_eval", train, base=["--task", "boxes"])

    def test_sequences_longer_than_the_positions_are_refused(self, run, tmp_path):
        words = ["--form", "text", "--max_position_embeddings", 12]
        with pytest.raises(ValueError, match="--max_position_embeddings gives 12 positions: make the samples shorter"):
            run("run", *words, base=CHAINS)

    def test_words_that_a_checkpoint_does_not_know_are_named(self, run, tmp_path):
        tracking_tokenizer(["Box", "0", "1", "is", "empty", "contains"]).save_pretrained(tmp_path / "llama")
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=10, **sizes)).save_pretrained(tmp_path / "llama")
        words = ["--model_name_or_path", tmp_path / "llama", "--eval_samples", 2]
        with pytest.raises(ValueError, match=r"Words that the tokenizer does not know: the, \w+"):
            run("run", *words, base=["--task", "boxes", "--num_operations", 1])
        with pytest.raises(ValueError, match="--model_name_or_path has other words than the task"):
            run("run", *words, base=["--task", "chains"])

    def test_a_checkpoint_takes_the_words_it_lacks(self, run, tmp_path):
        first = boxes_file(tmp_path / "train-t5.jsonl.gz", 4)
        small = ["--train_batch_size", 2, "--max_steps", 2, "--layer_types", "full", "chained", "--gamma", 0.9]
        run("first", "--boxes_train", first, "--boxes_eval", first, *small, base=["--task", "boxes"])
        known = AutoTokenizer.from_pretrained(tmp_path / "first").get_vocab()
        assert "contents" not in known
        deep = ["--task", "boxes", "--num_boxes", 3, "--num_operations", 2, "--boxes_operations", "contents=1"]
        deep += ["--eval_samples", 2, "--train_batch_size", 2, "--max_steps", 2]
        results = run("second", "--model_name_or_path", tmp_path / "first", "--add_words", base=deep)
        grown = AutoTokenizer.from_pretrained(tmp_path / "second").get_vocab()
        assert known.items() < grown.items()
        assert {"contents", "Move"} < set(grown)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
        assert (
            model.config.vocab_size == results["vocab_size"] == len(grown) == len(model.get_input_embeddings().weight)
        )
        with pytest.raises(SystemExit):
            run("third", "--add_words", base=deep)
        with pytest.raises(SystemExit):
            run("third", "--model_name_or_path", tmp_path / "first", "--add_words", base=["--task", "chains"])

    def test_divergence_stops_the_run(self, run, tmp_path):
        words = (
            "--learning_rate",
            1e38,
            "--lr_schedule",
            "constant",
            "--logging_steps",
            1,
            "--checkpointing_steps",
            1,
        )
        with pytest.raises(RuntimeError, match="Training has diverged"):
            run("run", *words, "--warmup_steps", 0)
        for checkpoint in list_checkpoints(tmp_path / "run"):
            assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())
