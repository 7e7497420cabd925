# SPDX-License-Identifier: Apache-2.0
"""Runs under torchrun: trains tiny models by DDP, then by FSDP, and leaves what every rank ended with in a folder."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

from tests.integration.tiny import chacal, image_batch, images, lipschitz, token_rows


def trained(model, rows: list[dict], folder: Path, batch_size: int, **arguments):
    """The model after four steps of `transformers.Trainer` over the rows, in their order."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=batch_size,
        max_steps=4,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **arguments,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    return model


def trained_by_sgd(model, inputs: dict):
    """The model after three steps on one batch."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    return model


def sharded(model, parts):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*parts, model):
        fully_shard(part, mesh=mesh)
    return model


def save_whole(model, folder: Path) -> None:
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    model.save_pretrained(folder, state_dict=whole, is_main_process=dist.get_rank() == 0)


def own_part(batch: dict) -> dict:
    return {key: tensor.chunk(dist.get_world_size())[dist.get_rank()] for key, tensor in batch.items()}


def ddp(folder: Path) -> None:
    for name, model, rows in (("lipschitz", lipschitz(), images()), ("chacal", chacal(), token_rows())):
        trained(model, rows, folder / name, batch_size=4)
        if dist.get_world_size() != 2:
            raise RuntimeError(f"{dist.get_world_size()} processes train together, not 2.")
        save_file(model.state_dict(), folder / f"{name}-{dist.get_rank()}.safetensors")
        if name == "lipschitz":
            model.eval().save_pretrained(folder / "saved", is_main_process=dist.get_rank() == 0)


def fsdp(folder: Path) -> None:
    rows = token_rows()[:8]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    model = chacal()
    trained_by_sgd(sharded(model, model.model.layers), own_part(batch))
    save_whole(model, folder / "chacal")
    for name in ("cpl", "sll"):
        model, inputs = lipschitz(name), own_part(image_batch())
        trained_by_sgd(sharded(model, model.lipschitz_vision.neck.blocks), inputs)
        with torch.no_grad():
            logits = model.eval()(inputs["pixel_values"], output_certified_radius=False).logits
        save_file({"logits": logits}, folder / f"{name}-{dist.get_rank()}.safetensors")
        try:
            model(inputs["pixel_values"])
        except ValueError as error:
            (folder / f"{name}-{dist.get_rank()}.txt").write_text(str(error))
        save_whole(model, folder / name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in (ddp, fsdp):
        output = Path(sys.argv[1]) / part.__name__
        output.mkdir(exist_ok=True)
        # the first one's Trainer makes the process group of both
        part(output)
    dist.destroy_process_group()
