# SPDX-License-Identifier: Apache-2.0
"""Loading and saving of models that carry a certificate: nothing missing, nothing extra, nothing half-written."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, logging, output_capturing
from transformers.utils.hub import cached_file, extract_commit_hash

from .. import __version__
from ..layers.base import LipschitzModule, RescaledModule
from .certificate import CERTIFICATE_NAME, LipschitzCertificate, weights_sha256
from .hub_model import PushableModel, hub_arguments_of


logger = logging.get_logger(__name__)

# arguments of `from_pretrained` that say where files come from
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# written aside, then renamed when whole; see `replace_files`
STAGING_PREFIX = ".saving-"
COMMITTED_NAME = ".saved"
# integers with the width of a float, for checksums
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def package_versions() -> dict[str, str]:
    return {"hf_lip": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def refuse_pickle(folder: Path) -> None:
    """Raise if a local folder holds pickled weights and no safetensors."""
    if not folder.is_dir() or any(folder.rglob("*.safetensors")) or any(folder.glob("*.safetensors.index.json")):
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ValueError(
            f"{folder} holds {', '.join(pickles)} and no model.safetensors. Pickles can run code and are not loaded: "
            "convert the weights with `safetensors.torch.save_file` in an environment you trust."
        )


def finish_interrupted_save(folder: Path) -> None:
    """Complete a save that was killed after all its files had been written and before all were in place."""
    committed = folder / COMMITTED_NAME
    if not committed.is_dir():
        return
    names = {path.name for path in committed.iterdir()}
    for name in sorted(names):
        os.replace(committed / name, folder / name)
    committed.rmdir()


def replace_files(staging: Path, target: Path) -> None:
    """Put the files of `staging` into `target`, all or nothing: a rename is the moment from which the new ones
    count."""
    for path in staging.iterdir():
        # safetensors files are created private; a checkpoint is as readable as its config
        path.chmod((staging / CONFIG_NAME).stat().st_mode & 0o777)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    names = {path.name for path in staging.iterdir()}
    os.rename(staging, target / COMMITTED_NAME)
    finish_interrupted_save(target)
    # shards of a former, larger checkpoint
    for path in target.glob("model*.safetensors*"):
        if path.name not in names:
            path.unlink()


def optional_file(source: str, name: str, hub_arguments: dict[str, Any]) -> str | None:
    """Local path of a file of a folder or Hub repository, None where there is none or the Hub cannot be reached."""
    return cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_arguments,
    )


def foreign_hooks(module: torch.nn.Module) -> tuple:
    """Forward hooks, but for those with which transformers records hidden states."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return tuple(hook for hook in hooks if getattr(hook, "__module__", None) != output_capturing.__name__)


def foreign_forward(module: torch.nn.Module) -> Any:
    """A `forward` put on the instance, but for accelerate's, which moves inputs to the module's device."""
    forward = vars(module).get("forward")
    moved = getattr(getattr(forward, "func", None), "__module__", None) == "accelerate.hooks"
    if moved and getattr(module._old_forward, "__func__", None) is type(module).forward:
        return None
    return forward


class CheckpointMismatchError(ValueError, RuntimeError):
    """The tensors do not fit the model. Also a `RuntimeError`, which is what transformers raises for wrong sizes."""


class CertifiedPreTrainedModel(PushableModel, PreTrainedModel):
    """`PreTrainedModel` whose checkpoints are complete, finite, safetensors only, and written atomically."""

    #: what the names of the head's tensors begin with: all that `ignore_mismatched_sizes` may initialise anew
    head_prefix = "classifier."

    def rescaled_modules(self) -> list[RescaledModule]:
        return [module for module in self.modules() if isinstance(module, RescaledModule)]

    @torch.no_grad()
    def freeze(self) -> None:
        """Make the stored rescalings belong to the weights, where training may have changed them."""
        for module in self.rescaled_modules():
            module.freeze_if_stale()

    @torch.no_grad()
    def tensor_state(self) -> tuple:
        """Changes whenever a tensor is replaced, cast or written to. The checksum sees what version counters do not:
        fused optimizers, `tensor.data`, numpy views. It is no protection against a tensor made to collide."""
        tensors = (*self.parameters(), *self.buffers())
        kinds = tuple(
            (tensor.dtype, tensor.shape, 0 if tensor.is_inference() else tensor._version) for tensor in tensors
        )
        sums = [tensor.detach().reshape(-1).view(INTEGERS[tensor.element_size()]).sum() for tensor in tensors]
        return kinds, tuple(torch.stack([value.to("cpu", torch.int64) for value in sums]).tolist())

    def unfit_tensor(self) -> str | None:
        """What keeps a tensor from being certified: a certificate is for floats in memory. None if nothing does."""
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if tensor.is_meta:
                return (
                    f"{name} is offloaded and has no data in memory: load the model without disk offload to certify "
                    "it."
                )
            if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or not tensor.is_floating_point():
                return (
                    f"{name} is a {type(tensor).__name__} of {tensor.dtype}, sharded or quantised, and is not "
                    "certified: gather the full weights into a model that is neither, or pass "
                    "`output_certified_radius=False`."
                )
        return None

    def require_plain_tensors(self) -> None:
        """Raise if tensors are offloaded, sharded or quantised."""
        problem = self.unfit_tensor()
        if problem is not None:
            raise ValueError(problem)

    def structure(self) -> dict[str, tuple]:
        """Type, settings, hooks and replaced `forward` of every module, by name: what adapters and wrappers change."""
        return {
            name: (
                type(module),
                module.extra_repr() if isinstance(module, LipschitzModule) else "",
                *foreign_hooks(module),
                # around the whole model anything may be wrapped: its certificate is for what it computes itself
                foreign_forward(module) if name else None,
            )
            for name, module in self.named_modules()
        }

    def require_structure(self, built: dict[str, tuple]) -> None:
        """Raise unless the modules are those that were built from the config."""
        structure = self.structure()
        for name in (*built, *structure):
            if structure.get(name) != built.get(name):
                kind = structure[name][0].__name__ if name in structure else "missing"
                raise ValueError(
                    f"`{name}` ({kind}) is not what the model was built with: an adapter, a wrapper, a hook or a "
                    "parametrisation may compute something else, so there is no certificate. Merge or unload adapters "
                    "(`merge_and_unload()` in PEFT), remove hooks, or pass `output_certified_radius=False`."
                )

    def require_finite(self, source: str) -> None:
        """Raise unless every tensor is finite, naming the first that is not."""
        for name, tensor in self.state_dict().items():
            if not tensor.is_meta and not torch.isfinite(tensor).all():
                raise ValueError(f"{name} in {source} holds NaN or infinite values: the checkpoint is damaged.")

    @staticmethod
    def progress_over(items: Sequence, progress: bool) -> Any:
        return logging.tqdm(items, desc="certify", disable=not progress)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As in transformers, and in addition: only safetensors; missing, unexpected or non-finite tensors are
        errors; the certificate beside the weights is checked against them.

        `ignore_mismatched_sizes=True` allows a new head (fine-tuning): missing and mismatched tensors of the head are
        then initialised. With None for the checkpoint, `config` and `state_dict` are it.

        Raises:
            ValueError: naming the file or tensor and the remedy.
            CheckpointMismatchError: a ValueError and RuntimeError, if tensors are missing, unexpected or misshapen.
        """
        in_memory = pretrained_model_name_or_path is None
        source = "`state_dict`" if in_memory else str(pretrained_model_name_or_path)
        if kwargs.setdefault("use_safetensors", True) is False:
            raise ValueError("`use_safetensors=False` is not supported: pickled weights can run code.")
        if not in_memory:
            folder = Path(source) / kwargs.get("subfolder", "")
            finish_interrupted_save(folder)
            refuse_pickle(folder)
        return_info = kwargs.pop("output_loading_info", False)
        hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        if not in_memory and not Path(source).is_dir():
            # one commit for the weights and their certificate, even if a push comes between the downloads
            config_file = optional_file(source, CONFIG_NAME, hub_arguments)
            commit = extract_commit_hash(config_file, None)
            if commit is not None:
                kwargs["revision"] = hub_arguments["revision"] = commit
        # mismatches are reported below, with their names
        new_head = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            loaded: Any = super().from_pretrained(
                None if in_memory else source,
                *model_args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kwargs,
            )
        except SafetensorError as error:
            raise ValueError(
                f"The weights in {source} are truncated or not in the safetensors format ({error}): fetch them again."
            ) from error
        model, info = loaded
        problems = {
            "missing": {str(name) for name in info["missing_keys"]},
            "unexpected": {str(name) for name in info["unexpected_keys"]},
            "mismatched": {name if isinstance(name, str) else name[0] for name in info["mismatched_keys"]},
        }
        for kind in ("missing", "mismatched"):
            problems[kind] = {name for name in problems[kind] if not (new_head and name.startswith(cls.head_prefix))}
        if any(problems.values()):
            listing = "; ".join(f"{kind}: {', '.join(sorted(names))}" for kind, names in problems.items() if names)
            raise CheckpointMismatchError(
                f"The weights in {source} do not fit {cls.__name__} with its config ({listing}). Nothing is dropped "
                "or initialised silently: use the checkpoint's own config, or `ignore_mismatched_sizes=True` to give "
                "it a new head."
            )
        model.require_finite(source)
        if not in_memory and not info["missing_keys"] and not info["mismatched_keys"]:
            model.adopt_certificate(source, hub_arguments)
        return (model, info) if return_info else model

    def adopt_certificate(self: Any, source: str, hub_arguments: dict[str, Any]) -> None:
        """Take over the certificate beside the weights if this class has one; a cast model is frozen and certified
        anew."""
        if not hasattr(self, "attach_certificate") or any(tensor.is_meta for tensor in self.state_dict().values()):
            return
        path = optional_file(source, CERTIFICATE_NAME, hub_arguments)
        if path is None:
            return
        if getattr(self, "hf_quantizer", None) is not None:
            logger.warning(f"{source} is quantised while it is loaded: its certificate is for other weights.")
            return
        certificate = LipschitzCertificate.load(path)
        dtype = str(self.dtype).removeprefix("torch.")
        if certificate.dtype != dtype:
            logger.warning(
                f"{source} is certified in {certificate.dtype} and loaded in {dtype}: its rescalings and its "
                "certificate are computed afresh for the weights as cast."
            )
            for module in self.rescaled_modules():
                module.freeze()
            return
        certificate.require_match(weights_sha256(self.state_dict()), self.config.architecture(), source)
        self.attach_certificate(certificate, source)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """As in transformers, with the certificate beside the weights. Files are written aside and then moved over
        the old ones, so that a kill during the save leaves the old checkpoint.

        A sharded model (FSDP) is saved from the whole weights, passed as `state_dict`, and certified for them.
        """
        self.freeze()
        if not is_main_process:
            return
        if state_dict is not None and any(hasattr(tensor, "full_tensor") for tensor in self.parameters()):
            whole = type(self)(self.config)
            whole.load_state_dict(state_dict)
            return whole.save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        target = Path(save_directory)
        if target.is_file():
            raise NotADirectoryError(f"`save_directory` {target} is a file.")
        target.mkdir(parents=True, exist_ok=True)
        hub_arguments = hub_arguments_of(kwargs)
        finish_interrupted_save(target)
        for abandoned in target.glob(f"{STAGING_PREFIX}*"):
            shutil.rmtree(abandoned)
        staging = Path(tempfile.mkdtemp(dir=target, prefix=STAGING_PREFIX))
        try:
            super().save_pretrained(staging, state_dict=state_dict, **kwargs)
            if hasattr(self, "certify"):
                self.write_certificate(staging, state_dict)
            replace_files(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        if push_to_hub:
            self.push_to_hub(hub_arguments.pop("repo_id", target.resolve().name), **hub_arguments)

    def write_certificate(self: Any, folder: Path, state_dict: dict | None) -> None:
        certificate = self.prove()
        if state_dict is not None and weights_sha256(state_dict) != certificate.weights_sha256:
            raise ValueError(
                "`state_dict` differs from the model's own weights, which are what the certificate is for: load it "
                "into the model and save without `state_dict`."
            )
        certificate.save(folder)
