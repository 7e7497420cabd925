# SPDX-License-Identifier: Apache-2.0
"""Train a causal language model on text, with Accelerate: softmax attention, chained attention, or both.

From scratch on a text file, its end held out, one token a character; matched in size, with other attention:

    python scripts/train_causal_lm.py --train_file input.txt.gz --tokenizer chars --block_size 256 --cpu \
        --num_hidden_layers 4 --hidden_size 128 --num_attention_heads 4 --attention softmax --output_dir runs/softmax
    ... --attention chained --gamma 0.5 --gamma_learnable --output_dir runs/chained
    ... --layer_types full chained full chained --gamma 0.1 --gamma_learnable --output_dir runs/mixed

A pre-trained Llama, Qwen2 or GPT-2 with its attention converted, as `hf-lip convert-attention` does, the discount
raised from 0 while it trains, or learnt from 0, one for each head:

    python scripts/train_causal_lm.py --model_name_or_path path/to/llama --attention chained --gamma 0.5 \
        --gamma_warmup_steps 500 --train_file train.txt --eval_file eval.txt --learning_rate 5e-4 \
        --output_dir runs/converted
    ... --attention chained --gamma_learnable --output_dir runs/learnt

A data set of the Hub, read as a stream, on every GPU of the machine:

    accelerate launch scripts/train_causal_lm.py --dataset HuggingFaceFW/fineweb --dataset_config sample-10BT \
        --eval_split train --max_eval_tokens 100000 --streaming --shuffle_buffer 1000 --tokenizer gpt2 \
        --block_size 1024 --num_hidden_layers 12 --hidden_size 768 --num_attention_heads 12 --attention chained \
        --max_steps 20000 --checkpointing_steps 500 --mixed_precision bf16 --output_dir runs/fineweb

Two processes on CPU (`accelerate launch --cpu --num_processes 2` would start one); interrupted and taken up again:

    torchrun --standalone --nproc-per-node 2 scripts/train_causal_lm.py --cpu --checkpointing_steps 100 ...
    torchrun --standalone --nproc-per-node 2 scripts/train_causal_lm.py --cpu --checkpointing_steps 100 ... \
        --resume_from_checkpoint latest

Documents follow each other, each with an end-of-sequence token, and are cut into blocks; a block may hold the end of
one document and the beginning of the next. Evaluation predicts every token of the text once, from windows of
--block_size tokens every --eval_stride: perplexity of a token, bits a character and a byte.

Written to --output_dir: the model, its tokenizer, results.json, checkpoint-<step> folders.
"""

from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import set_seed
from numpy.typing import NDArray
from transformers import HfArgumentParser, PreTrainedTokenizerBase

from hf_lip.hub import push_folder, require_pushable
from hf_lip.training.sequence_arguments import SequenceModelArguments, SequenceTrainingArguments
from hf_lip.training.sequence_batches import StepBatches
from hf_lip.training.sequence_blocks import StreamBlocks, TextBlocks
from hf_lip.training.sequence_models import build_model, gamma_schedule
from hf_lip.training.sequence_perplexity import EvaluationText, measure_perplexity
from hf_lip.training.sequence_run import SequenceRun, check_run, start_accelerator
from hf_lip.training.sequence_text import (
    TextArguments,
    choose_tokenizer,
    encode_documents,
    load_text_dataset,
    read_text,
    text_column,
)


Arguments = tuple[TextArguments, SequenceModelArguments, SequenceTrainingArguments]


def repository(args: SequenceTrainingArguments) -> str:
    """What --push_to_hub pushes to."""
    return args.hub_model_id or Path(args.output_dir).resolve().name


def parse_arguments(argv: list[str] | None) -> Arguments:
    """Parse and check whatever can be checked without work; exits with a usage message otherwise."""
    kinds: Any = (TextArguments, SequenceModelArguments, SequenceTrainingArguments)
    parser = HfArgumentParser(kinds, description=(__doc__ or "").split("\n")[0])
    try:
        text, model, args = parser.parse_args_into_dataclasses(argv)
        if text.streaming and args.num_train_epochs is not None:
            raise ValueError("--num_train_epochs needs data that end: give --max_steps with --streaming.")
        check_run(args)
        if args.push_to_hub:
            require_pushable(repository(args), args.hub_token)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return text, model, args


def tokens(documents: list[str], tokenizer: PreTrainedTokenizerBase, argument: str) -> NDArray[np.int32]:
    return np.concatenate(list(encode_documents(documents, tokenizer, argument=argument)))


def file_texts(text: TextArguments) -> tuple[list[str], list[str]]:
    """Documents to train on and to evaluate on."""
    train = [read_text(path) for path in text.train_file or []]
    if text.eval_file is not None:
        return train, [read_text(path) for path in text.eval_file]
    length = len(train[-1]) - round(text.eval_share * sum(map(len, train)))
    if not 0 < length < len(train[-1]):
        raise ValueError("--eval_share leaves no text to train or to evaluate on: give --eval_file.")
    return [*train[:-1], train[-1][:length]], [train[-1][length:]]


def dataset_texts(text: TextArguments, split: str) -> list[str]:
    """All documents of a split."""
    data = load_text_dataset(text, split, streaming=False)
    found = [row for row in data[text_column(data, text.text_column)] if row]
    if not found:
        raise ValueError(f"--dataset {text.dataset!r} has no text in its split {split!r}.")
    return found


def stream_texts(text: TextArguments, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The documents of the evaluation split, or its first ones with --max_eval_tokens."""
    data = load_text_dataset(text, text.eval_split, streaming=True)
    column, found, count = text_column(data, text.text_column), [], 0
    for row in data:
        found.append(row[column])
        if text.max_eval_tokens is not None:
            count += sum(map(len, encode_documents([row[column]], tokenizer, argument="--dataset")))
            if count >= text.max_eval_tokens:
                break
    if not found:
        raise ValueError(f"--dataset {text.dataset!r} has no text in its split {text.eval_split!r}.")
    return found


def evaluation_text(
    text: TextArguments, documents: list[str], tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> EvaluationText:
    argument = "--eval_file" if text.eval_file else "--dataset" if text.dataset else "--train_file"
    ids = tokens(documents, tokenizer, argument)
    whole = text.max_eval_tokens is None or len(ids) <= text.max_eval_tokens
    return EvaluationText.of_ids(
        ids[: text.max_eval_tokens],
        "".join(documents) if whole else None,
        tokenizer,
        window=text.block_size,
        stride=text.eval_stride or text.block_size,
        batch_size=batch_size,
    )


def main(argv: list[str] | None = None) -> None:
    text, model_args, args = parse_arguments(argv)
    accelerator = start_accelerator(args)
    train: list[str] = []
    if text.dataset is None:
        train, evaluated = file_texts(text)
    tokenizer = choose_tokenizer(text.tokenizer, model_args.model_name_or_path, train)
    if text.dataset is not None:
        with accelerator.main_process_first():
            train = [] if text.streaming else dataset_texts(text, text.train_split)
            evaluated = stream_texts(text, tokenizer) if text.streaming else dataset_texts(text, text.eval_split)
    eval_text = evaluation_text(text, evaluated, tokenizer, args.eval_batch_size)
    shares = {
        "num_micro_batches": args.gradient_accumulation_steps,
        "process_index": accelerator.process_index,
        "num_processes": accelerator.num_processes,
    }
    batches: Any
    if text.streaming:
        data = load_text_dataset(text, text.train_split, streaming=True)
        column = text_column(data, text.text_column)
        if text.shuffle_buffer:
            # one shard at a time: several are read by threads, whose end `datasets` waits for, for seconds an epoch
            data = data.shuffle(seed=args.seed, buffer_size=text.shuffle_buffer, max_buffer_input_shards=1)
        sizes = (text.block_size, args.num_steps(None), args.train_batch_size)
        batches = StreamBlocks(data, column, tokenizer, *sizes, **shares)
    else:
        ids = tokens(train, tokenizer, "--dataset" if text.dataset else "--train_file")
        blocks = TextBlocks(ids, text.block_size, args.seed, args.train_batch_size)
        batches = StepBatches(blocks, args.num_steps(blocks.steps_per_epoch), args.train_batch_size, **shares)
    set_seed(args.seed)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model = build_model(model_args, len(tokenizer), text.block_size, special, use_rope=True).to(accelerator.device)

    def measure() -> tuple[dict[str, Any], str]:
        found = measure_perplexity(model, eval_text, accelerator)
        shown = f"perplexity {found['perplexity']:.3f}  {found['bits_per_byte']:.4f} bits a byte"
        return {"evaluation": found}, shown

    run = SequenceRun(args, (text, model_args, args), accelerator, argv)
    metrics = run.train(model, batches, measure, gamma_schedule(model, model_args))
    if accelerator.is_main_process:
        run.write(model, tokenizer, metrics, {"vocab_size": len(tokenizer)}, len(batches))
        if args.push_to_hub:
            report = push_folder(
                args.output_dir, repository(args), token=args.hub_token, commit_message="Upload a language model"
            )
            accelerator.print(f"Pushed {report.url}")
    run.end()


if __name__ == "__main__":
    main()
