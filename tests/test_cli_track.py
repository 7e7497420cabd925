# SPDX-License-Identifier: Apache-2.0
import json
import re

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_lip.cli import app
from hf_lip.data import tracking_dataset
from hf_lip.models.chacal.configuration_chacal import ChacalConfig
from hf_lip.models.chacal.converted import ChacalGPT2Config, ChacalGPT2LMHeadModel
from hf_lip.models.chacal.modeling_chacal import ChacalForCausalLM
from hf_lip.pipelines.track import load_tracking_model, track

from .models.handmade_chains import TASK, handmade_model, written_places


runner = CliRunner()
ROW = max(tracking_dataset(TASK, 20, "test"), key=lambda row: row["num_state_changes"])
TEXT = ROW["prompt"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model, tokenizer = handmade_model()
    path = tmp_path_factory.mktemp("models") / "handmade"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """A converted model with random weights, and a byte-level tokenizer, whose unknown token is its end of text."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "gpt2"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={"<end>": 0} | {letter: i + 1 for i, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<end>")
    tokenizer.save_pretrained(path)
    config = ChacalGPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=12, chain_gamma=[0.9, -0.5],
        bos_token_id=0, eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    ChacalGPT2LMHeadModel(config).save_pretrained(path)
    return path


def run(*arguments):
    return runner.invoke(app, ["track", *map(str, arguments)], env={"COLUMNS": "220", "NO_COLOR": "1"})


def require_refusal(result, *texts):
    assert result.exit_code == 2, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("Error: ")
    for text in texts:
        assert text in line
    assert "Traceback" not in result.output


def cells(output):
    """Rows of the tables: lines that begin with a position."""
    return [line.split() for line in output.splitlines() if re.match(r"\s+\d+\s", line)]


def test_table_json_and_plot(folder, tmp_path):
    result = run(folder, TEXT, "--json", tmp_path / "a" / "p.json", "--plot", tmp_path / "b" / "p.png", "--rollout")
    assert result.exit_code == 0, result.output
    places, count = written_places(TEXT), len(TEXT.split()) + 1
    assert f"Answer: '{ROW['answer']}' (probability 1.0000, 2 tokens)" in result.output
    assert "layer 1 (chained, gamma 0.9), all 2 heads" in result.output
    # only the root's place holds a value: one row, of the literal's variable
    (row,) = cells(result.output)
    assert row[:2] == [str(places[-1]), TEXT.split()[places[-1] - 1]]
    assert row[3] == "1.0000"
    content = json.loads((tmp_path / "a" / "p.json").read_text())
    assert (content["format"], content["format_version"]) == ("hf_lip/provenance", 1)
    assert content["tokens"] == ["<bos>", *TEXT.split(), ROW["answer"], "<eos>"]
    assert (content["answer"], content["ended"], content["num_text_tokens"]) == (ROW["answer"], True, count)
    first, last = content["answer_tokens"]
    assert (first["token"], first["read_at"]) == (ROW["answer"], count - 1)
    assert (last["token"], last["read_at"]) == ("<eos>", count)
    (layer,) = first["layers"]
    assert (layer["layer"], layer["type"]) == (1, "chained_attention")
    assert layer["gamma"] == pytest.approx([0.9, 0.9])
    weights, contributions = torch.tensor(layer["effective_weights"]), torch.tensor(layer["contributions"])
    assert weights.shape == (2, count + 1)
    assert contributions.nonzero().flatten().tolist() == [places[-1]]
    torch.testing.assert_close(weights[0, places], 0.1 * 0.9 ** torch.arange(len(places)))
    assert float(row[2]) == pytest.approx(weights.mean(0)[places[-1]].item(), abs=1e-4)
    assert sum(first["rollout_estimate"]) == pytest.approx(1.0, abs=1e-5)
    with Image.open(tmp_path / "b" / "p.png") as image:
        assert image.format == "PNG"
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["p.json", "p.png"]


def test_the_whole_path_by_weight(folder):
    result = run(folder, TEXT, "--by", "weight", "--head", 0, "--top", len(written_places(TEXT)) + 1)
    assert result.exit_code == 0, result.output
    rows = cells(result.output)
    # the chain in its order, and the place where chains end
    assert [int(row[0]) for row in rows[:-1]] == written_places(TEXT)
    assert rows[-1][:2] == ["0", "<bos>"]
    assert float(rows[1][2]) == pytest.approx(0.09, abs=1e-4)


def test_another_layer(folder):
    result = run(folder, TEXT, "--layer", -2, "--head", 1, "--top", 1)
    assert result.exit_code == 0, result.output
    assert "layer 0 (ordinary attention), head 1" in result.output
    (row,) = cells(result.output)
    # that head reads the token before the last one
    assert row == [str(len(TEXT.split()) - 2), ";", "1.0000", "1.0000"]


def test_a_converted_model_whose_answer_is_cut_off(gpt2_folder, tmp_path):
    result = run(gpt2_folder, "Ünï x", "--top", 2, "--json", tmp_path / "p.json", "--plot", tmp_path / "p.svg")
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "p.json").read_text())
    # seven bytes; the last token is said at the last position, and not read
    assert content["num_text_tokens"] == 7
    assert len(content["answer_tokens"]) <= 6
    assert content["ended"] or len(content["answer_tokens"]) == 6
    for answer in content["answer_tokens"]:
        assert [layer["layer"] for layer in answer["layers"]] == [0, 1]
        assert len(answer["layers"][0]["contributions"]) == 6 + len(content["answer_tokens"])
    assert min(map(min, content["answer_tokens"][0]["layers"][1]["effective_weights"])) < 0
    assert "<svg" in (tmp_path / "p.svg").read_text()


def test_track_in_python(folder):
    model, tokenizer = load_tracking_model(str(folder))
    found = track(model, tokenizer, TEXT)
    assert found.answer == ROW["answer"]
    assert found.ended
    assert found.explained == [0]
    assert found.probability == pytest.approx(found.probabilities[0] * found.probabilities[1])
    weights = found.values("weight", -1, per_head=True)
    assert weights.shape == (2, 2, len(TEXT.split()) + 2)
    torch.testing.assert_close(found.values("weight", 1), weights.mean(1))
    shares = found.values("contribution", 1)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2))
    with pytest.raises(ValueError, match="`measure`"):
        found.values("rollout", 1)
    with pytest.raises(ValueError, match="`max_new_tokens`"):
        track(model, tokenizer, TEXT, max_new_tokens=0)
    short = track(model, tokenizer, TEXT, max_new_tokens=1)
    assert not short.ended
    assert short.answer_tokens == (ROW["answer"],)


def test_texts_that_cannot_be_read(folder):
    for text in ("", " \n"):
        require_refusal(run(folder, text), "`text` is empty")
    require_refusal(run(folder, "5 > v3 ; zebra > v99 ; v3 ?"), "does not know: zebra, v99")
    require_refusal(run(folder, " ; ".join(["5 > v3"] * 17)), "68 tokens, but the model has 64 positions")


def test_texts_up_to_the_last_position(folder):
    model, tokenizer = load_tracking_model(str(folder))
    text = "5 > v3 ; " + "; " * 57 + "v3 ?"
    found = track(model, tokenizer, text)
    assert (found.num_text_tokens, found.answer, found.ended) == (64, "5", False)
    assert track(model, tokenizer, text.replace("; ", "", 1)).ended


def test_bad_options(folder, tmp_path):
    require_refusal(run(folder, TEXT, "--by", "rollout"), "`--by` must be")
    require_refusal(run(folder, TEXT, "--top", 0), "`--top` must be at least 1")
    require_refusal(run(folder, TEXT, "--layer", 2), "`layer` must lie in [-2, 1]")
    require_refusal(run(folder, TEXT, "--head", 2), "`--head` must lie in [0, 1]")
    require_refusal(run(folder, TEXT, "--max-new-tokens", 0), "`max_new_tokens`")
    require_refusal(run(folder, TEXT, "--plot", tmp_path), "is a folder")
    require_refusal(run(folder, TEXT, "--plot", tmp_path / "plot"), "has no suffix")
    require_refusal(run(folder, TEXT, "--plot", tmp_path / "plot.docx"), "docx")
    assert not list(tmp_path.iterdir())


def test_bad_models(folder, tmp_path):
    require_refusal(run(tmp_path / "missing", TEXT), "does not exist", "Hub id")
    _, tokenizer = handmade_model()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    ChacalForCausalLM(ChacalConfig(**sizes, layer_types=["full_attention"])).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    require_refusal(run(tmp_path, TEXT, "--max-new-tokens", 1), "no chained layer")
    assert run(tmp_path, TEXT, "--max-new-tokens", 1, "--layer", 0).exit_code == 0
