# SPDX-License-Identifier: Apache-2.0
"""Certify a data set by randomized smoothing on one or many processes, with a log that survives interruptions.

One process, all GPUs of a machine, two processes on a CPU:

    python scripts/certify.py --model runs/resnet --data uoft-cs/cifar10 --sigma 0.25 --out runs/certify
    accelerate launch scripts/certify.py --model runs/resnet --data uoft-cs/cifar10 --dtype bfloat16 --out runs/certify
    torchrun --standalone --nproc-per-node 2 scripts/certify.py --cpu --model runs/resnet --out runs/certify

After an interruption of any kind the same command with --resume goes on, with any number of processes. The images are
shared among the processes; the finished log is the same, but for the times, as that of one process.

Written to --out: counts.jsonl (settings, then the votes of every image), certificates.tsv (the columns of Cohen et
al.), summary.json and plots. `hf-lip certify --from-counts OUT/counts.jsonl` certifies from the votes again.
"""

import os
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_lip.metrics import STANDARD_RADII
from hf_lip.pipelines.dataset_run import Processes
from hf_lip.pipelines.job import CertifyJob
from hf_lip.pipelines.report import write_report
from hf_lip.pipelines.settings import METHODS
from hf_lip.training.run_record import command_line


# processes that are done wait for the slowest
LONGEST_RUN = timedelta(days=60)


@dataclass
class DataArguments:
    model: str = field(metadata={"help": "Folder or Hub id of an image classifier."})
    out: str = field(metadata={"help": "Folder of the log and the report."})
    data: str = field(
        default="digits", metadata={"help": "'digits', a folder or file of parquet, a folder of images, or a Hub id."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the Hub repository."})
    split: str = field(default="test", metadata={"help": "Split of the data."})
    name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    image_column: str | None = field(default=None, metadata={"help": "Column with the images."})
    label_column: str | None = field(default=None, metadata={"help": "Column with the labels."})
    stride: int = field(default=1, metadata={"help": "Certify every STRIDE-th image; 20 is usual for CIFAR-10."})
    limit: int | None = field(default=None, metadata={"help": "Certify at most LIMIT images."})
    resume: bool = field(default=False, metadata={"help": "Go on with the log in --out, if there is one."})
    overwrite: bool = field(default=False, metadata={"help": "Delete the log in --out first."})


@dataclass
class SmoothingArguments:
    method: str = field(default="mono", metadata={"help": "How votes or scores are judged.", "choices": METHODS[2:]})
    mode: str = field(default="certify", metadata={"help": "predict gives classes without radii."})
    sigma: float = field(default=0.25, metadata={"help": "Noise level, pixels in [0, 1]."})
    n0: int = field(default=100, metadata={"help": "Noisy copies that choose the class."})
    # not `n`: torchrun and accelerate would take --n for an abbreviation of options of their own
    samples: int = field(default=100_000, metadata={"help": "Noisy copies n that bound its probability."})
    alpha: float = field(default=0.001, metadata={"help": "Failure probability of one certificate."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise."})
    budget: str = field(default="fixed", metadata={"help": "adaptive stops when more samples gain little."})
    rtol: float = field(default=0.02, metadata={"help": "adaptive: relative loss of radius to stop at."})
    target_radius: float | None = field(default=None, metadata={"help": "adaptive: radius to decide about."})
    score_map: str | None = field(default=None, metadata={"help": "lvm, betting: such as 'softmax(t=2.0)'."})
    calibrate: int | None = field(
        default=None, metadata={"help": "lvm, betting: choose the score map on so many other images."}
    )
    calibrate_split: str = field(default="train", metadata={"help": "Split of those images."})
    randomized: bool = field(default=False, metadata={"help": "Randomised Clopper-Pearson bounds."})
    lipschitz_aware: bool = field(default=False, metadata={"help": "lvm, betting: use the model's proved constant."})
    sound_noise: int | None = field(
        default=None, metadata={"help": "Exact noise on the grid k/SOUND_NOISE: 255 for 8-bit images."}
    )
    denoiser: str | None = field(
        default=None, metadata={"help": "Diffusion pipeline, or package.module:name of a function, in front."}
    )
    dtype: str | None = field(default=None, metadata={"help": "float32, bfloat16 or float16 for the network."})
    compile: bool = field(default=False, metadata={"help": "Run a compiled graph."})
    batch_size: int | None = field(default=None, metadata={"help": "Noisy copies a forward pass."})
    cpu: bool = field(default=False, metadata={"help": "Run on the CPU; needed for several processes on a CPU."})


def start_processes(cpu: bool) -> PartialState:
    state = PartialState(cpu=cpu, timeout=LONGEST_RUN)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and state.num_processes == 1:
        raise RuntimeError(
            f"{launched} processes were launched but each would certify everything: on CPU pass --cpu to this script "
            "under torchrun; on GPUs use `accelerate launch` or torchrun with as many GPUs."
        )
    return state


def make_job(data: DataArguments, smoothing: SmoothingArguments, device: Any) -> CertifyJob:
    names = ("method", "mode", "sigma", "n0", "alpha", "seed", "budget", "rtol", "target_radius", "score_map")
    more = ("randomized", "lipschitz_aware", "dtype", "compile")
    settings = {name: getattr(smoothing, name) for name in (*names, *more)}
    settings["n"] = smoothing.samples
    settings["sound_noise"] = False if smoothing.sound_noise is None else smoothing.sound_noise
    source = {name: getattr(data, name) for name in ("data", "split", "name", "image_column", "label_column")}
    return CertifyJob(
        model=data.model,
        settings=settings,
        source=source,
        denoiser=smoothing.denoiser,
        calibrate=smoothing.calibrate,
        calibrate_split=smoothing.calibrate_split,
        limit=data.limit,
        stride=data.stride,
        batch_size=smoothing.batch_size,
        device=device,
        revision=data.revision,
    )


def main(argv: list[str] | None = None) -> None:
    kinds: Any = (DataArguments, SmoothingArguments)
    data, smoothing = HfArgumentParser(kinds, description=(__doc__ or "").split("\n")[0]).parse_args_into_dataclasses(
        argv
    )
    state = start_processes(smoothing.cpu)
    job = make_job(data, smoothing, state.device)
    with state.main_process_first():
        job.load()
    out = Path(data.out)
    processes = Processes(state.process_index, state.num_processes, state.wait_for_everyone)
    with tqdm(desc="noisy copies", unit_scale=True, disable=not state.is_main_process) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        records = job.run(out, resume=data.resume, overwrite=data.overwrite, processes=processes, progress=progress)
    if records is not None:
        summary = {**job.summary(records, STANDARD_RADII), "command": command_line(argv)}
        title = f"{Path(data.model).name} on {Path(data.data).name} ({data.split})"
        write_report(out, records, summary, title)
        print(describe(summary))
    if state.num_processes > 1:
        state.wait_for_everyone()
        # gloo's thread needs the GIL to let go; freeing the group would wait for it with the GIL held
        time.sleep(2.0)
        state.destroy_process_group()


def describe(summary: dict[str, Any]) -> str:
    line = f"{summary['num_images']} images, accuracy {100 * summary['clean_accuracy']:.2f} %"
    if "certified_accuracy" in summary:
        certified = (f"{100 * share:.2f} at {name}" for name, share in summary["certified_accuracy"].items())
        line += f", certified {'  '.join(certified)}, ACR {summary['average_certified_radius']:.4f}"
    return f"{line}, abstentions {100 * summary['abstention_rate']:.2f} %"


if __name__ == "__main__":
    main()
