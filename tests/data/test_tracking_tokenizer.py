# SPDX-License-Identifier: Apache-2.0
import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_lip.data import (
    BoxesTask,
    ChainsTask,
    TrackingCollator,
    add_words,
    encode_answers,
    tracking_dataset,
    tracking_tokenizer,
    unknown_words,
    words_of,
)


TEXT = "Box 0 contains the cup, Box 1 is empty. Box 0"


def rows_of(*pairs):
    return datasets.Dataset.from_list([{"prompt": prompt, "answer": answer} for prompt, answer in pairs])


def test_words_and_marks_are_tokens():
    assert words_of([TEXT]) == [",", ".", "0", "1", "Box", "contains", "cup", "empty", "is", "the"]
    tokenizer = tracking_tokenizer(words_of([TEXT]))
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", *TEXT.replace(",", " ,").replace(".", " .").split()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT.replace(",", " ,").replace(".", " .")
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert special == (0, 1, 2, 3)


def test_a_saved_tokenizer_is_the_same(tmp_path):
    tokenizer = tracking_tokenizer(BoxesTask().vocabulary())
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    prompts = tracking_dataset(BoxesTask(), 1)["prompt"][:20]
    assert loaded(prompts)["input_ids"] == tokenizer(prompts)["input_ids"]
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 2)
    ids = tokenizer(TEXT)["input_ids"]
    assert loaded.decode(ids) == tokenizer.decode(ids)


def test_unknown_words_are_named():
    tokenizer = tracking_tokenizer(words_of([TEXT]))
    assert unknown_words(tokenizer, "Box 0 contains the zebra and the cup, zebra.") == ["zebra", "and"]
    assert unknown_words(tokenizer, "") == []
    with pytest.raises(ValueError, match="does not know: zebra, and"):
        encode_answers(rows_of((TEXT, "contains the zebra and the cup")), tokenizer)


def test_new_words_come_after_those_that_a_tokenizer_has(tmp_path):
    tokenizer = tracking_tokenizer(words_of([TEXT]))
    before, size = tokenizer(TEXT)["input_ids"], len(tokenizer)
    assert add_words(tokenizer, ["Box", "zebra", "cup", "and", "zebra"]) == ["zebra", "and"]
    assert len(tokenizer) == size + 2
    assert tokenizer(TEXT)["input_ids"] == before
    asked = "Box 0 contains the zebra and the cup, zebras."
    assert tokenizer.convert_ids_to_tokens(tokenizer(asked)["input_ids"])[5:7] == ["zebra", "and"]
    assert unknown_words(tokenizer, asked) == ["zebras"]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(asked)["input_ids"] == tokenizer(asked)["input_ids"]
    assert loaded.decode(loaded(asked)["input_ids"]) == "<bos> Box 0 contains the zebra and the cup , <unk> ."


def test_words_that_can_not_be_added():
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate("abc")}, merges=[]))
    byte_pairs = PreTrainedTokenizerFast(tokenizer_object=inner)
    with pytest.raises(ValueError, match="'two words', which is not one word"):
        add_words(tracking_tokenizer(["Box"]), ["two words"])
    with pytest.raises(ValueError, match="Only a tokenizer of whole words takes new ones"):
        add_words(byte_pairs, ["zebra"])


def test_labels_are_the_answer_alone():
    tokenizer = tracking_tokenizer(words_of([TEXT]))
    row = encode_answers(rows_of((TEXT, "contains the cup")), tokenizer)[0]
    assert row["input_ids"] == tokenizer(f"{TEXT} contains the cup <eos>")["input_ids"]
    assert row["labels"][-4:] == tokenizer.convert_tokens_to_ids(["contains", "the", "cup", "<eos>"])
    assert set(row["labels"][:-4]) == {-100}
    assert len(row["labels"]) == len(row["input_ids"])


def test_encoding_a_stream_keeps_the_columns():
    task = BoxesTask(num_operations=2)
    tokenizer = tracking_tokenizer(task.vocabulary())
    whole = list(encode_answers(tracking_dataset(task, 2), tokenizer))
    stream = encode_answers(tracking_dataset(task, 2, streaming=True), tokenizer)
    assert list(stream) == whole
    assert {"prompt", "answer", "numops", "implicit_hops", "input_ids", "labels"} <= set(whole[0])


def test_tokenizers_of_other_models():
    """A byte-level tokenizer, as pre-trained models have: the answer begins with its space."""
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate("abcĠ")} | {"<end>": 4}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    row = encode_answers(rows_of(("ab", "c")), tokenizer)[0]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["a", "b", "Ġ", "c", "<end>"]
    assert row["labels"] == [-100, -100, *row["input_ids"][2:]]
    with pytest.raises(ValueError, match="`eos_token`"):
        encode_answers(rows_of(("ab", "c")), PreTrainedTokenizerFast(tokenizer_object=inner))


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (rows_of(("", "cup")), {}, "An empty prompt"),
        (rows_of(("Box 0", " ")), {}, "An empty answer"),
        (rows_of(("Box 0", "cup")), {"max_length": 4}, "5 tokens, more than `max_length` 4"),
        (datasets.Dataset.from_list([{"prompt": "Box"}]), {}, "no column 'answer'"),
    ],
)
def test_rows_that_can_not_be_encoded(rows, arguments, message):
    tokenizer = tracking_tokenizer(words_of([TEXT]))
    with pytest.raises(ValueError, match=message):
        encode_answers(rows, tokenizer, **arguments)
    if "max_length" in arguments:
        assert len(encode_answers(rows, tokenizer, max_length=5)[0]["input_ids"]) == 5


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [([], "is empty"), (["a", "a"], "twice: a"), (["<pad>"], "<pad>"), (["a b"], "'a b'"), (["a."], "'a.'")],
)
def test_bad_vocabularies(vocabulary, message):
    with pytest.raises(ValueError, match=message):
        tracking_tokenizer(vocabulary)


# batches


def test_right_and_left_padding():
    rows = [
        {"input_ids": [1, 5, 6, 7], "labels": [-100, -100, 6, 7], "numops": 3},
        {"input_ids": [1, 8], "labels": [-100, 8], "numops": 0},
    ]
    batch = TrackingCollator(extra_columns=("numops",))(rows)
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7], [1, 8, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 6, 7], [-100, 8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["numops"].tolist() == [3, 0]
    prompts = TrackingCollator(padding_side="left", prompts_only=True, pad_token_id=9)(rows)
    assert prompts["input_ids"].tolist() == [[1, 5], [9, 1]]
    assert prompts["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert set(prompts) == {"input_ids", "attention_mask"}
    wide = TrackingCollator(pad_to_multiple_of=8)(rows)
    assert {value.shape for value in wide.values()} == {(2, 8)}


def test_statements_are_padded_in_threes():
    rows = list(tracking_dataset(ChainsTask(num_entities=2, num_state_changes=(0, 5)), 5))
    batch = TrackingCollator()(rows)
    length = max(len(row["statement_ids"]) for row in rows)
    assert batch["statement_ids"].shape == (5, length, 3)
    for ids, hops, mask, row in zip(batch["statement_ids"], batch["hops"], batch["attention_mask"], rows):
        count = len(row["statement_ids"])
        assert ids[:count].tolist() == row["statement_ids"]
        assert not ids[count:].any()
        assert hops.tolist() == row["hops"] + [-1] * (length - count)
        assert mask.sum() == count


@pytest.mark.parametrize(
    ("collator", "rows", "message"),
    [
        ({}, [], "`rows` is empty"),
        ({}, [{"prompt": "Box"}], "call `encode_answers` first"),
        ({"prompts_only": True}, [{"input_ids": [1]}], "`prompts_only` needs"),
        ({"prompts_only": True}, [{"input_ids": [1], "labels": [-100]}], "no label"),
        ({"padding_side": "both"}, [], "`padding_side`"),
        ({"pad_to_multiple_of": 0}, [], "`pad_to_multiple_of`"),
    ],
)
def test_batches_that_can_not_be_made(collator, rows, message):
    with pytest.raises(ValueError, match=message):
        TrackingCollator(**collator)(rows)


def test_a_model_trains_and_answers():
    """One batch by heart: what is trained with `labels` is what `generate` gives for the prompts."""
    task = BoxesTask(num_boxes=2, num_operations=2, queries_per_world=2)
    tokenizer = tracking_tokenizer(task.vocabulary())
    dataset = encode_answers(tracking_dataset(task, 3), tokenizer)
    rows = list(dataset)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=2, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = TrackingCollator()(rows)
    for _ in range(120):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    prompts = TrackingCollator(padding_side="left", prompts_only=True)(rows)
    out = model.generate(**prompts, max_new_tokens=12, do_sample=False)
    answers = tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answers == [row["answer"] for row in rows]
