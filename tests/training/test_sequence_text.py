# SPDX-License-Identifier: Apache-2.0
"""Tokenizers, blocks, streams and perplexity of text."""

import gzip
import math

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoTokenizer

from hf_lip import ChacalConfig, ChacalForCausalLM
from hf_lip.training.sequence_blocks import StreamBlocks, TextBlocks
from hf_lip.training.sequence_perplexity import EvaluationText, measure_perplexity
from hf_lip.training.sequence_text import (
    TextArguments,
    byte_tokenizer,
    character_tokenizer,
    encode_documents,
    read_text,
    text_column,
)


ODD_TEXT = "añ€😀\n  x\tIt's <unk>."


class TestTokenizers:
    def test_bytes_write_any_text_and_give_it_back(self, tmp_path):
        tokenizer = byte_tokenizer()
        ids = tokenizer(ODD_TEXT)["input_ids"]
        assert len(ids) == len(ODD_TEXT.encode())
        assert tokenizer.decode(ids) == ODD_TEXT
        tokenizer.save_pretrained(tmp_path)
        assert AutoTokenizer.from_pretrained(tmp_path)(ODD_TEXT)["input_ids"] == ids

    def test_characters_are_those_of_the_text(self):
        tokenizer = character_tokenizer([ODD_TEXT, "zz"])
        ids = tokenizer(ODD_TEXT)["input_ids"]
        assert len(ids) == len(ODD_TEXT)
        assert tokenizer.decode(ids) == ODD_TEXT
        assert len(tokenizer) == 3 + len(set(ODD_TEXT) | {"z"})

    def test_documents_end(self):
        tokenizer = character_tokenizer(["ab"])
        found = [ids.tolist() for ids in encode_documents(["ab", "b"], tokenizer, argument="--train_file")]
        assert found == [[3, 4, 2], [4, 2]]

    def test_unknown_characters_are_named(self):
        with pytest.raises(ValueError, match=r"--eval_file has characters .* know: 'y', 'z'. Use --tokenizer bytes"):
            list(encode_documents(["abzy"], character_tokenizer(["abc"]), argument="--eval_file"))

    def test_no_characters_are_refused(self):
        with pytest.raises(ValueError, match="empty"):
            character_tokenizer([""])


class TestReading:
    def test_plain_and_gzipped_files(self, tmp_path):
        (tmp_path / "a.txt").write_text(ODD_TEXT, encoding="utf-8")
        (tmp_path / "a.txt.gz").write_bytes(gzip.compress(ODD_TEXT.encode()))
        assert read_text(tmp_path / "a.txt") == read_text(tmp_path / "a.txt.gz") == ODD_TEXT

    def test_bad_files_are_refused(self, tmp_path):
        (tmp_path / "blank.txt").write_text(" \n")
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
        (tmp_path / "half.txt.gz").write_bytes(gzip.compress(b"text" * 99)[:-12])
        for name, message in (
            ("blank.txt", "is empty"),
            ("latin.txt", "UTF-8 text"),
            ("half.txt.gz", "gzipped UTF-8"),
        ):
            with pytest.raises(ValueError, match=message):
                read_text(tmp_path / name)
        with pytest.raises(FileNotFoundError, match="check the path"):
            read_text(tmp_path / "none.txt")

    def test_the_column_of_texts(self):
        one = datasets.Dataset.from_dict({"id": [1], "story": ["a"]})
        assert text_column(one, None) == "story"
        assert text_column(datasets.Dataset.from_dict({"title": ["a"], "text": ["b"]}), None) == "text"
        with pytest.raises(ValueError, match=r"no one column of texts among \['title', 'body'\]: name it with --text"):
            text_column(datasets.Dataset.from_dict({"title": ["a"], "body": ["b"]}), None)
        with pytest.raises(ValueError, match=r"--text_column 'x' is no column of --dataset, whose columns are \['id'"):
            text_column(one, "x")
        with pytest.raises(ValueError, match="no one column of texts"):
            text_column(one.remove_columns("story").to_iterable_dataset(), None)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({}, "either --train_file or --dataset"),
            ({"train_file": ["a"], "dataset": "b"}, "either --train_file or --dataset"),
            ({"train_file": ["a"], "streaming": True}, "--streaming is an option of --dataset"),
            ({"train_file": ["a"], "eval_share": 0.0}, "nothing to evaluate on"),
            ({"train_file": ["a"], "block_size": 8, "eval_stride": 9}, "tokens would be left out"),
            ({"train_file": ["a"], "block_size": 0}, "--block_size must be > 0"),
            ({"dataset": "a", "tokenizer": "chars"}, "--tokenizer chars"),
            ({"dataset": "a", "shuffle_buffer": 5}, "--shuffle_buffer is an option of --streaming"),
        ],
    )
    def test_wrong_arguments_are_refused_with_their_name(self, changes, message):
        with pytest.raises(ValueError, match=message):
            TextArguments(**changes)


class TestBlocks:
    def test_an_epoch_predicts_every_token_of_its_blocks_once(self):
        ids = np.arange(103, dtype=np.int32)
        blocks = TextBlocks(ids, 10, seed=0, batch_size=3)
        assert (blocks.num_blocks, blocks.steps_per_epoch) == (9, 3)
        epochs = []
        for epoch in range(2):
            drawn = [block for step in range(3) for block in blocks.draw(3 * epoch + step, 0.5, range(3))]
            batch = blocks.collate(drawn)
            assert torch.equal(batch["targets"], batch["input_ids"] + 1)
            targets = sorted(batch["targets"].flatten().tolist())
            assert targets == list(range(targets[0], targets[0] + 90))
            epochs.append(batch["targets"].tolist())
        assert epochs[0] != epochs[1]

    def test_the_shortest_text_has_one_block(self):
        blocks = TextBlocks(np.arange(11, dtype=np.int32), 10, seed=0, batch_size=1)
        assert blocks.collate(blocks.draw(5, 0.5, range(1)))["targets"].tolist() == [list(range(1, 11))]
        with pytest.raises(ValueError, match=r"--train_batch_size is 1 blocks of --block_size 10.* 10 tokens"):
            TextBlocks(np.arange(10, dtype=np.int32), 10, seed=0, batch_size=1)


def stream(documents, num_steps=6, batch_size=2, buffer=0, **shares):
    data = datasets.Dataset.from_dict({"text": documents}).to_iterable_dataset()
    if buffer:
        data = data.shuffle(seed=3, buffer_size=buffer)
    return StreamBlocks(data, "text", character_tokenizer(["abcdefghij"]), 4, num_steps, batch_size, **shares)


DOCUMENTS = ["abcdefg", "", "h", "ij", "aabbccddee", "jihgf"]


class TestStreams:
    def test_blocks_follow_the_documents_and_begin_again(self):
        steps = [parts[0] for parts, _ in stream(DOCUMENTS).from_step(0, None, 0)]
        found = torch.cat([step["input_ids"].flatten() for step in steps]).tolist()
        tokens = {letter: 3 + place for place, letter in enumerate("abcdefghij")}
        text = [token for document in DOCUMENTS for token in [*(tokens[letter] for letter in document), 2]]
        assert found == (text * 3)[: 6 * 2 * 4]
        targets = torch.cat([step["targets"].flatten() for step in steps]).tolist()
        assert targets == (text * 3)[1 : 6 * 2 * 4 + 1]

    @pytest.mark.parametrize("buffer", [0, 4])
    def test_any_position_continues_as_if_nothing_had_happened(self, buffer):
        whole = list(stream(DOCUMENTS, buffer=buffer).from_step(0, None, 0))
        assert len(whole) == 6
        for step in (1, 3, 5):
            position = whole[step - 1][1]
            rest = list(stream(DOCUMENTS, buffer=buffer).from_step(step, position, 0))
            assert [later[1] for later in rest] == [earlier[1] for earlier in whole[step:]]
            for (later, _), (earlier, _) in zip(rest, whole[step:], strict=True):
                assert torch.equal(later[0]["input_ids"], earlier[0]["input_ids"])
                assert torch.equal(later[0]["targets"], earlier[0]["targets"])
        assert whole[-1][1]["epoch"] > 0

    def test_documents_before_the_position_are_not_tokenised(self):
        late = stream(["z", "abcdefghij"])
        with pytest.raises(ValueError, match="'z'"):
            next(iter(late.from_step(0, None, 0)))
        parts, _ = next(iter(stream(["z", "abcdefghij"]).from_step(0, {"epoch": 0, "documents": 1, "tokens": 2}, 0)))
        assert parts[0]["input_ids"].tolist() == [[5, 6, 7, 8], [9, 10, 11, 12]]

    def test_processes_share_the_blocks_of_a_step(self):
        whole = [parts[0]["input_ids"] for parts, _ in stream(DOCUMENTS, batch_size=4).from_step(0, None, 0)]
        shares = [
            list(
                stream(DOCUMENTS, batch_size=4, num_micro_batches=2, process_index=index, num_processes=2).from_step(
                    0, None, 0
                )
            )
            for index in (0, 1)
        ]
        for step, expected in enumerate(whole):
            rows = [row for share in shares for part in share[step][0] for row in part["input_ids"].tolist()]
            assert sorted(rows) == sorted(expected.tolist())

    def test_streams_without_text_are_refused(self):
        for documents, message in (([""], "no text"), ([None, "a"], "None in the column 'text' of document 0")):
            blocks = stream(documents)
            # an end of sequence is a token
            blocks.tokenizer.eos_token = None
            with pytest.raises(ValueError, match=message):
                next(iter(blocks.from_step(0, None, 0)))

    def test_workers_are_refused(self):
        with pytest.raises(ValueError, match="--num_workers must be 0 with --streaming"):
            next(iter(stream(DOCUMENTS).from_step(0, None, 1)))


def small_model(**changes):
    sizes = {"vocab_size": 262, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "chunk_size": 8}
    return ChacalForCausalLM(ChacalConfig(**{**sizes, "initializer_range": 0.3, **changes})).eval()


class TestPerplexity:
    text = "Wie man in den Wald hineinruft, so schallt es heraus — immer, überall."
    tokenizer = byte_tokenizer()

    def ids(self):
        return np.array(self.tokenizer(self.text)["input_ids"], dtype=np.int32)

    @pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (7, 1), (200, 200)])
    def test_every_token_is_predicted_once_from_its_window(self, window, stride):
        ids, model = self.ids(), small_model()
        text = EvaluationText.of_ids(ids, self.text, self.tokenizer, window=window, stride=stride, batch_size=3)
        found = measure_perplexity(model, text, Accelerator(cpu=True))
        losses, predicted = [], 1
        for start in range(0, len(ids), stride):
            part = torch.tensor(ids[start : start + window + 1], dtype=torch.int64)[None]
            with torch.no_grad():
                log_probabilities = model(part[:, :-1]).logits.double().log_softmax(-1)
            for place in range(predicted, start + part.shape[1]):
                losses.append(-float(log_probabilities[0, place - start - 1, int(ids[place])]))
            predicted = max(predicted, start + part.shape[1])
            if predicted >= len(ids):
                break
        assert found["num_tokens"] == len(losses) == len(ids) - 1
        assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
        assert found["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / (len(ids) - 1), rel=1e-5)
        characters = len(self.text) - 1
        assert found["bits_per_character"] == pytest.approx(sum(losses) / math.log(2) / characters, rel=1e-5)

    def test_more_context_does_not_change_what_is_counted(self):
        text = EvaluationText.of_ids(self.ids()[:20], None, self.tokenizer, window=8, stride=2, batch_size=2)
        assert sum(int((batch["targets"] != -100).sum()) for batch in text.batches) == 19
        assert (text.num_characters, text.num_bytes) == (19, 19)

    def test_one_token_is_refused(self):
        with pytest.raises(ValueError, match="has 1 tokens, and two are needed"):
            EvaluationText.of_ids(self.ids()[:1], None, self.tokenizer, window=8, stride=8, batch_size=2)

    def test_a_diverged_model_is_an_error(self):
        model = small_model()
        model.lm_head.weight.data.fill_(1e9)
        model.lm_head.weight.data[::2] *= -1
        text = EvaluationText.of_ids(self.ids(), self.text, self.tokenizer, window=8, stride=8, batch_size=2)
        with pytest.raises(RuntimeError, match="has diverged"):
            measure_perplexity(model, text, Accelerator(cpu=True))
