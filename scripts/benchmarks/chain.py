# SPDX-License-Identifier: Apache-2.0
"""Chained attention against ordinary attention: time and peak memory of training, time of decoding.

    OMP_NUM_THREADS=1 python scripts/benchmarks/chain.py --clock cpu
    python scripts/benchmarks/chain.py --device cuda --dtype bfloat16 --lengths 1024 4096 16384

Forward and backward of one attention call are timed against torch's scaled dot product attention of the same shapes,
and against the plain triangular solve with an n x n matrix. Methods take turns, the best round of each counts. Peak
memory is that of a process of its own above what it held before the call (CUDA: the allocator's). Decoding compares
two models that differ in their layer types only, token by token after a prompt.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import DynamicCache, HfArgumentParser

from hf_lip.models.chacal.configuration_chacal import ChacalConfig
from hf_lip.models.chacal.modeling_chacal import ChacalForCausalLM
from hf_lip.ops.chain import chained_attention, naive_chained_attention


METHODS = ("sdpa", "chained", "naive")


@dataclass
class ChainArguments:
    lengths: list[int] = field(
        default_factory=lambda: [256, 512, 1024, 2048, 4096, 8192], metadata={"help": "Tokens of a sequence."}
    )
    batch_size: int = field(default=1, metadata={"help": "Sequences."})
    heads: int = field(default=8, metadata={"help": "Heads."})
    head_dim: int = field(default=64, metadata={"help": "Features of a head."})
    gamma: float = field(default=0.9, metadata={"help": "Discount."})
    diagonal: Literal["strict", "keep"] = field(default="strict", metadata={"help": "Variant."})
    chunk_size: int = field(default=128, metadata={"help": "Rows solved at a time."})
    longest_naive: int = field(default=4096, metadata={"help": "Tokens up to which the plain solve is run."})
    rounds: int = field(default=5, metadata={"help": "Rounds; the best one counts."})
    seconds: float = field(default=0.3, metadata={"help": "Least time of a round, by repeating the call."})
    clock: Literal["wall", "cpu"] = field(
        default="wall", metadata={"help": "cpu: of this process, for a busy machine."}
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "Of the inputs."})
    device: str = field(default="cpu", metadata={"help": "Torch device."})
    memory: bool = field(default=True, metadata={"help": "Measure peak memory too."})
    decode_lengths: list[int] = field(
        default_factory=lambda: [256, 1024], metadata={"help": "Prompts of the decoding."}
    )
    decode_tokens: int = field(default=32, metadata={"help": "Tokens decoded after the prompt in a round."})
    decode_layers: int = field(default=4, metadata={"help": "Layers of the decoding models."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})


def attention(method: str, arguments: ChainArguments) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One of METHODS as a function of query, key and value."""
    if method == "sdpa":
        return lambda query, key, value: F.scaled_dot_product_attention(query, key, value, is_causal=True)
    gamma, diagonal = arguments.gamma, arguments.diagonal
    if method == "naive":
        return lambda query, key, value: naive_chained_attention(query, key, value, gamma, diagonal=diagonal)
    return lambda query, key, value: (
        chained_attention(query, key, value, gamma, diagonal=diagonal, chunk_size=arguments.chunk_size).output
    )


def inputs(length: int, arguments: ChainArguments) -> list[Tensor]:
    shape = (arguments.batch_size, arguments.heads, length, arguments.head_dim)
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    return [torch.randn(shape, device=arguments.device).to(dtype).requires_grad_() for _ in range(3)]


def forward_backward(method: str, length: int, arguments: ChainArguments) -> Callable[[], Any]:
    tensors, run = inputs(length, arguments), attention(method, arguments)
    weight = torch.randn_like(tensors[0])
    return lambda: torch.autograd.grad(run(*tensors), tensors, weight)


def forward_only(method: str, length: int, arguments: ChainArguments) -> Callable[[], Any]:
    tensors, run = inputs(length, arguments), attention(method, arguments)

    def call() -> Tensor:
        with torch.no_grad():
            return run(*tensors)

    return call


def best_times(calls: dict[str, Callable[[], Any]], arguments: ChainArguments) -> dict[str, float]:
    """Milliseconds of each call, the calls taking turns."""
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time

    def seconds(call: Callable[[], Any], repeats: int) -> float:
        start = clock()
        for _ in range(repeats):
            call()
        if arguments.device.startswith("cuda"):
            torch.cuda.synchronize()
        return (clock() - start) / repeats

    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, round(arguments.seconds / max(seconds(call, 1), 1e-6)))
    rounds = [{name: seconds(call, repeats[name]) for name, call in calls.items()} for _ in range(arguments.rounds)]
    return {name: 1e3 * min(found[name] for found in rounds) for name in calls}


def high_water_mark() -> int:
    """Bytes this process has held at most (Linux)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024


def _peak_in_child(method: str, length: int, arguments: ChainArguments, threads: int, queue: Any) -> None:
    torch.set_num_threads(threads)
    forward_backward(method, 64, arguments)()  # what the first call loads
    call = forward_backward(method, length, arguments)
    before = high_water_mark()
    call()
    queue.put(high_water_mark() - before)


def peak_memory(method: str, length: int, arguments: ChainArguments) -> float:
    """MiB above the inputs that one forward and backward pass needs."""
    if arguments.device.startswith("cuda"):
        call = forward_backward(method, length, arguments)
        call()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_peak_in_child, args=(method, length, arguments, torch.get_num_threads(), queue))
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError(f"Measuring the memory of {method} at {length} tokens ended with {child.exitcode}.")
    return queue.get() / 2**20


@torch.no_grad()
def decode_times(length: int, arguments: ChainArguments) -> dict[str, float]:
    """Milliseconds a token after a prompt of `length`, of the softmax and of the chained model, equal weights."""
    width = arguments.heads * arguments.head_dim
    calls: dict[str, Callable[[], Any]] = {}
    for name, kind in (("softmax", "full_attention"), ("chained", "chained_attention")):
        torch.manual_seed(0)
        config = ChacalConfig(
            vocab_size=1000,
            hidden_size=width,
            num_hidden_layers=arguments.decode_layers,
            num_attention_heads=arguments.heads,
            max_position_embeddings=length + arguments.decode_tokens + 1,
            gamma=arguments.gamma,
            diagonal=arguments.diagonal,
            layer_types=[kind] * arguments.decode_layers,
        )
        model: Any = ChacalForCausalLM(config)
        model.to(arguments.device, getattr(torch, arguments.dtype)).eval()
        cache = DynamicCache(config=config)
        prompt = torch.randint(0, 1000, (arguments.batch_size, length), device=arguments.device)
        model(prompt, past_key_values=cache, logits_to_keep=1)

        def call(model=model, cache=cache, token=prompt[:, :1]) -> None:
            for _ in range(arguments.decode_tokens):
                model(token, past_key_values=cache)
            cache.crop(-arguments.decode_tokens)

        calls[name] = call
    return {name: found / arguments.decode_tokens for name, found in best_times(calls, arguments).items()}


def measure(arguments: ChainArguments) -> dict[str, Any]:
    results: dict[str, Any] = {"arguments": asdict(arguments), "threads": torch.get_num_threads(), "training": []}
    for length in tqdm(arguments.lengths, desc="training", file=sys.stderr):
        methods = [name for name in METHODS if name != "naive" or length <= arguments.longest_naive]
        row: dict[str, Any] = {"length": length}
        for kind, make in (("forward", forward_only), ("forward_backward", forward_backward)):
            row[kind] = best_times({name: make(name, length, arguments) for name in methods}, arguments)
        if arguments.memory:
            row["peak_mib"] = {name: peak_memory(name, length, arguments) for name in methods}
        results["training"].append(row)
    results["decoding"] = [
        {"length": length, **decode_times(length, arguments)}
        for length in tqdm(arguments.decode_lengths, desc="decoding", file=sys.stderr)
    ]
    return results


def table(results: dict[str, Any]) -> str:
    """Markdown tables of times in ms, ratios to SDPA, and peak memory in MiB."""
    lines = ["| n | SDPA f+b | chained f+b | ratio | forward ratio | naive f+b | peak MiB: SDPA, chained, naive |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for row in results["training"]:
        both, forward, peak = row["forward_backward"], row["forward"], row.get("peak_mib", {})
        naive = f"{both['naive']:.1f}" if "naive" in both else "-"
        memory = ", ".join(f"{peak[name]:.0f}" if name in peak else "-" for name in METHODS)
        lines.append(
            f"| {row['length']} | {both['sdpa']:.1f} | {both['chained']:.1f} | {both['chained'] / both['sdpa']:.2f} | "
            f"{forward['chained'] / forward['sdpa']:.2f} | {naive} | {memory} |"
        )
    lines += ["", "| prompt | softmax ms a token | chained ms a token | ratio |", "| --- | --- | --- | --- |"]
    for row in results["decoding"]:
        softmax, chained = row["softmax"], row["chained"]
        lines.append(f"| {row['length']} | {softmax:.3f} | {chained:.3f} | {chained / softmax:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = HfArgumentParser(ChainArguments)  # type: ignore[arg-type]
    (arguments,) = parser.parse_args_into_dataclasses()
    results = measure(arguments)
    print(table(results))
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
