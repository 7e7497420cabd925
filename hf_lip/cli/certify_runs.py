# SPDX-License-Identifier: Apache-2.0
"""The work behind `hf-lip certify`; torch and transformers are imported when it starts."""

from pathlib import Path
from typing import Any

from hf_lip.cli.certify_output import print_summary
from hf_lip.cli.console import progress_bar


def certify_images(
    job: dict[str, Any], out: Path, thresholds: dict[str, float], words: list[str], *, resume: bool, overwrite: bool
) -> None:
    """Run a `CertifyJob` of these arguments, write its report and print it.

    Args:
        words: of the command line, for the summary.
    """
    import datasets
    import transformers
    from huggingface_hub.utils import disable_progress_bars

    import hf_lip.assets
    from hf_lip.pipelines.job import CertifyJob
    from hf_lip.pipelines.report import write_report
    from hf_lip.smoothing.logs import LOG_NAME, TSV_NAME
    from hf_lip.training.run_record import command_line

    datasets.disable_progress_bars()
    disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if job["model"] is None:
        if job["revision"] is not None:
            raise ValueError("`--revision` is of a Hub repository: name it as MODEL.")
        job |= {"model": str(hf_lip.assets.DEFAULT_MODEL_DIR), "model_name": "embedded default"}
    work = CertifyJob(**job)
    work.load()
    with progress_bar() as bar:
        task = bar.add_task("Images" if work.method == "lipschitz" else "Noisy copies", total=work.copies)
        records = work.run(
            out,
            resume=resume,
            overwrite=overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    assert records is not None
    summary = {**work.summary(records, thresholds), "command": command_line(words, program="hf-lip")}
    title = f"{Path(summary['model']).name} on {Path(summary['data']).name} ({summary['split']})"
    logs = [out / TSV_NAME] if work.method == "lipschitz" else [out / TSV_NAME, out / LOG_NAME]
    print_summary(summary, logs + write_report(out, records, summary, title))


def certify_from_counts(
    log: Path, out: Path, method: str, alpha: float, thresholds: dict[str, float], words: list[str]
) -> None:
    """Certificates from the votes of a log, their report, printed."""
    from hf_lip.models.certificate import write_text_atomically
    from hf_lip.pipelines.report import recertify, summarise, write_report
    from hf_lip.smoothing.logs import LOG_NAME, TSV_NAME, read_log, tsv_text
    from hf_lip.training.run_record import command_line, public_path, public_value

    if (out / LOG_NAME).exists():
        raise ValueError(f"`--out` {out} holds a log of its own: give another folder, so that both are kept.")
    settings, records = read_log(log)
    if not records:
        raise ValueError(f"`--from-counts` {log} holds no image yet.")
    records = recertify(settings, records, method=method, alpha=alpha)
    settings = public_value({**settings, "method": method, "alpha": alpha, "from_counts": public_path(str(log))})
    summary = {
        **{key: settings[key] for key in ("model", "data", "split")},
        "weights_sha256": settings["weights_sha256"],
        **summarise(records, thresholds, alpha=alpha),
        "settings": settings,
        "command": command_line(words, program="hf-lip"),
    }
    write_text_atomically(out / TSV_NAME, tsv_text(records))
    title = f"{Path(settings['model']).name} on {Path(settings['data']).name} ({settings['split']})"
    print_summary(summary, [out / TSV_NAME, *write_report(out, records, summary, title)])
