# SPDX-License-Identifier: Apache-2.0
"""Train a causal language model to track entities, with Accelerate: chained attention against softmax, by depth.

Chains of up to 63 state changes, one token a statement, one chained layer; evaluated on longer ones too:

    python scripts/train_entity_tracking.py --task chains --num_state_changes 1 63 --eval_num_state_changes 64 127 \
        --layer_types chained --gamma 0.99 --output_dir runs/chains-1 --cpu
    python scripts/train_entity_tracking.py --task chains --num_state_changes 1 63 --eval_num_state_changes 64 127 \
        --num_hidden_layers 6 --attention softmax --output_dir runs/chains-softmax-6 --cpu

Boxes from files, an ordinary layer and a chained one; all questions of a text share one pass over it. Training begins
with small worlds made by the rules of the data set and goes on to larger ones as they are learnt; at its end half of
them are whole ones of the files, with the names of their objects exchanged:

    python scripts/train_entity_tracking.py --task boxes --boxes_train boxes/train-t5.jsonl.gz \
        --boxes_eval boxes/dev-t5.jsonl.gz boxes/test-t5.jsonl.gz --rename_objects --curriculum grow \
        --curriculum_loss 0.08 --curriculum_share 0.7 --curriculum_power 4 --changed_weight 3 --answer_order text \
        --questions_per_text 12 --layer_types full chained --gamma 0.9 --diagonal keep --hidden_size 128 \
        --num_attention_heads 16 --config_overrides head_dim=16 --intermediate_size 256 --initializer_range 0.1 \
        --tie_word_embeddings --learning_rate 0.001 --lr_schedule stable_decay --adam_betas 0.9 0.99 \
        --train_batch_size 16 --max_steps 10000 --output_dir runs/boxes-1+1 --cpu

What is left in a box when something is taken out is learnt in worlds of two boxes or not at all: they are kept until
the loss is below 0.08, which 8 heads or fewer take far longer for than 16.

Generated worlds that take depth: one object at most in a box, and every operation moves what is in a box without
naming it. Longer ones for a second evaluation; all boxes from the start, as nothing is taken out; the sizes, AdamW and
the schedule of above:

    python scripts/train_entity_tracking.py --task boxes --num_boxes 8 --max_objects 1 --expected_objects 1 \
        --boxes_operations contents=1 --num_operations 12 --eval_num_operations 24 --curriculum grow \
        --curriculum_boxes 8 --curriculum_loss 0.02 --curriculum_share 0.7 --changed_weight 3 --answer_order text \
        --questions_per_text 8 --layer_types full chained --gamma 0.99 --diagonal keep --max_steps 5000 ...

On from a released model, with words that it does not know:

    python scripts/train_entity_tracking.py --task boxes --model_name_or_path model_cards/chacal-boxes --add_words ...

Also --task random_chains, permutations, babi and propara. Two processes on CPU (`accelerate launch --cpu
--num_processes 2` would start one); interrupted and taken up again:

    torchrun --standalone --nproc-per-node 2 scripts/train_entity_tracking.py --cpu --checkpointing_steps 100 ...
    torchrun --standalone --nproc-per-node 2 scripts/train_entity_tracking.py --cpu --checkpointing_steps 100 ... \
        --resume_from_checkpoint latest

Defaults are the recipe of the depth experiments: AdamW 2e-3, cosine with 100 warm-up steps, 64 sequences a step, 1500
steps. Sample i depends on --seed and i alone. An answer is right if all of its tokens are: the share of questions that
greedy decoding answers token for token.

Written to --output_dir: the model, its tokenizer, results.json, checkpoint-<step> folders.
"""

from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase

from hf_lip.data import add_words, tracking_tokenizer, words_of
from hf_lip.hub import push_folder, require_pushable
from hf_lip.training.sequence_arguments import SequenceModelArguments, SequenceTrainingArguments
from hf_lip.training.sequence_batches import FileTexts, GeneratedSamples, StepBatches
from hf_lip.training.sequence_evaluation import EvaluationSet, describe, evaluate_tracking, generated_rows
from hf_lip.training.sequence_models import build_model, gamma_schedule
from hf_lip.training.sequence_questions import encode_texts
from hf_lip.training.sequence_run import SequenceRun, check_run, start_accelerator
from hf_lip.training.sequence_tasks import TrackingArguments
from hf_lip.training.sequence_worlds import BoxTexts, worlds_of_rows


Arguments = tuple[TrackingArguments, SequenceModelArguments, SequenceTrainingArguments]


def repository(args: SequenceTrainingArguments) -> str:
    """What --push_to_hub pushes to."""
    return args.hub_model_id or Path(args.output_dir).resolve().name


def parse_arguments(argv: list[str] | None) -> Arguments:
    """Parse and check whatever can be checked without work; exits with a usage message otherwise."""
    kinds: Any = (TrackingArguments, SequenceModelArguments, SequenceTrainingArguments)
    parser = HfArgumentParser(kinds, description=(__doc__ or "").split("\n")[0])
    try:
        task, model, args = parser.parse_args_into_dataclasses(argv)
        if task.generated and args.num_train_epochs is not None:
            raise ValueError("--num_train_epochs needs data that end: give --max_steps for generated samples.")
        if task.curriculum_loss is not None and args.num_workers:
            raise ValueError("--num_workers makes batches ahead, and --curriculum_loss decides them late: give 0.")
        if task.add_words and model.model_name_or_path is None:
            raise ValueError("--add_words adds to the words of a checkpoint: give --model_name_or_path.")
        check_run(args)
        if args.push_to_hub:
            require_pushable(repository(args), args.hub_token)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return task, model, args


def choose_tokenizer(
    task: TrackingArguments, model: SequenceModelArguments, words: list[str]
) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer, with the words it lacks where `--add_words` asks for them, or one word a token.

    Raises:
        ValueError: a checkpoint with other words than the statements of a dense task.
    """
    own = tracking_tokenizer(words)
    if model.model_name_or_path is None:
        return own
    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path)
    if task.add_words:
        add_words(tokenizer, words)
    if task.dense and tokenizer.get_vocab() != own.get_vocab():
        raise ValueError(
            f"--model_name_or_path has other words than the task ({len(tokenizer)} and {len(own)}): give --num_values "
            "and --num_variables as it was trained, or --form text."
        )
    return tokenizer


def generated_data(
    task: TrackingArguments, model: SequenceModelArguments, args: SequenceTrainingArguments
) -> tuple[PreTrainedTokenizerBase, GeneratedSamples | BoxTexts, list[EvaluationSet], int]:
    first, second = task.tasks()
    tokenizer = choose_tokenizer(task, model, first.vocabulary())
    make: GeneratedSamples | BoxTexts
    if task.task == "boxes":
        make = BoxTexts(task, tokenizer, args.seed, args.train_batch_size)
    else:
        make = GeneratedSamples(task, args.seed, args.train_batch_size, None if task.dense else tokenizer)
    sets, longest = [], 0
    for name, one in ((task.eval_split, first), ("extrapolation", second)):
        if one is None:
            continue
        rows = generated_rows(one, task)
        if task.dense:
            longest = max(longest, *(len(row["labels"]) for row in rows))
            sets.append(EvaluationSet.of_rows(name, rows, task, args.eval_batch_size))
        else:
            texts = encode_texts(rows, tokenizer, task.text_key)
            longest = max(longest, *(text.longest() for text in texts))
            sets.append(EvaluationSet.of_texts(name, texts, task, args.eval_batch_size))
    return tokenizer, make, sets, longest


def file_data(
    task: TrackingArguments, model: SequenceModelArguments, args: SequenceTrainingArguments
) -> tuple[PreTrainedTokenizerBase, FileTexts | BoxTexts, list[EvaluationSet], int]:
    train, evaluated = task.load()
    rows = [*train, *(row for part in evaluated.values() for row in part)]
    words = {word for row in rows for text in (row["prompt"], row["answer"]) for word in text.split()}
    tokenizer = choose_tokenizer(task, model, words_of(words))
    texts = encode_texts(train, tokenizer, task.text_key)
    make: FileTexts | BoxTexts
    if task.task == "boxes" and task.questions:
        make = BoxTexts(task, tokenizer, args.seed, args.train_batch_size, worlds_of_rows(train))
    else:
        make = FileTexts(texts, task.questions, args.seed, args.train_batch_size)
    longest, sets = max(text.longest() for text in texts), []
    for name, part in evaluated.items():
        texts = encode_texts(part, tokenizer, task.text_key)
        longest = max(longest, *(text.longest() for text in texts))
        sets.append(EvaluationSet.of_texts(name, texts, task, args.eval_batch_size))
    return tokenizer, make, sets, longest


def main(argv: list[str] | None = None) -> None:
    task, model_args, args = parse_arguments(argv)
    accelerator = start_accelerator(args)
    samples: Any
    tokenizer, samples, sets, longest = (generated_data if task.generated else file_data)(task, model_args, args)
    set_seed(args.seed)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    built = build_model(model_args, len(tokenizer), longest, special, use_rope=task.ordered, add_tokens=task.add_words)
    model = built.to(accelerator.device)
    batches = StepBatches(
        samples,
        args.num_steps(getattr(samples, "steps_per_epoch", None)),
        args.train_batch_size,
        num_micro_batches=args.gradient_accumulation_steps,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        pace=task.pace(),
    )

    def measure_accuracy() -> tuple[dict[str, Any], str]:
        judge = tokenizer if task.eval_generate else None
        found = {one.name: evaluate_tracking(model, one, accelerator, judge) for one in sets}
        lines = [f"{name} {describe(metrics, task.depth_names[0])}" for name, metrics in found.items()]
        return {"evaluations": found}, "  ".join(lines)

    run = SequenceRun(args, (task, model_args, args), accelerator, argv)
    metrics = run.train(model, batches, measure_accuracy, gamma_schedule(model, model_args))
    if accelerator.is_main_process:
        facts = {"task": task.task, "vocab_size": len(tokenizer), "longest_sequence": longest}
        run.write(model, tokenizer, metrics, facts, len(batches))
        if args.push_to_hub:
            message = f"Upload a model trained on {task.task}"
            report = push_folder(args.output_dir, repository(args), token=args.hub_token, commit_message=message)
            accelerator.print(f"Pushed {report.url}")
    run.end()


if __name__ == "__main__":
    main()
