# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from hf_lip.checkpoints.source import Checkpoint

from ..hub_endpoint import HubEndpoint


ROOT = Path(__file__).resolve().parents[2]
TENSORS = {
    "b.weight": torch.arange(6.0).reshape(2, 3),
    "a.weight": torch.arange(4.0, dtype=torch.float64),
    "c.weight": torch.arange(5.0).to(torch.bfloat16),
}


def shard(folder, placement, weight_map=None):
    """Write tensors to files as `placement` (file -> names) says, and an index that says `weight_map`."""
    folder.mkdir(exist_ok=True)
    for file, names in placement.items():
        save_file({name: TENSORS[name] for name in names}, folder / file)
    weight_map = weight_map or {name: file for file, names in placement.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def with_header(path, header, data=b""):
    """A safetensors file with exactly this header text."""
    text = header.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def require_all(checkpoint):
    assert sorted(checkpoint.names) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype
        assert checkpoint.num_bytes(name) == tensor.numel() * tensor.element_size()
        assert name in checkpoint
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_a_folder_with_one_file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    checkpoint = Checkpoint.open(tmp_path)
    require_all(checkpoint)
    assert checkpoint.files == [tmp_path / "model.safetensors"]
    assert checkpoint.config == {"model_type": "bert"}
    # safetensors stores wide types first
    assert checkpoint.names[0] == "a.weight"


def test_a_file_given_directly_beside_others(tmp_path):
    save_file(TENSORS, tmp_path / "one.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "two.safetensors")
    require_all(Checkpoint.open(tmp_path / "one.safetensors"))
    with pytest.raises(ValueError, match=r"several safetensors files without an index \(one.safetensors, two"):
        Checkpoint.open(tmp_path)


def test_a_folder_with_one_file_of_another_name(tmp_path):
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    require_all(Checkpoint.open(str(tmp_path)))


def test_shards(tmp_path):
    folder = shard(
        tmp_path / "m", {"model-1.safetensors": ["b.weight"], "model-2.safetensors": ["a.weight", "c.weight"]}
    )
    seen = []
    checkpoint = Checkpoint.open(folder, progress=lambda *step: seen.append(step))
    require_all(checkpoint)
    assert [file.name for file in checkpoint.files] == ["model-1.safetensors", "model-2.safetensors"]
    assert checkpoint.file("c.weight").name == "model-2.safetensors"
    assert seen == [(0, 2, "model-1.safetensors"), (1, 2, "model-2.safetensors"), (2, 2, "")]


def test_shards_under_another_name(tmp_path):
    shard(tmp_path, {"one.safetensors": ["b.weight"], "two.safetensors": ["a.weight", "c.weight"]})
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "diffusion_model.safetensors.index.json")
    require_all(Checkpoint.open(tmp_path))
    (tmp_path / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="several checkpoints"):
        Checkpoint.open(tmp_path)


def test_tensors_are_read_one_at_a_time_into_memory_of_their_own(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    checkpoint = Checkpoint.open(tmp_path)
    tensor = checkpoint.tensor("b.weight")
    path.write_bytes(save({name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}))
    assert torch.equal(tensor, TENSORS["b.weight"])
    assert not checkpoint.tensor("b.weight").any()


def test_unknown_tensor(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(KeyError, match="'d' is not a tensor"):
        Checkpoint.open(tmp_path).tensor("d")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt", "net.pkl"])
def test_pickles_are_not_opened(tmp_path, name):
    # unpickling it would raise another error
    (tmp_path / name).write_bytes(b"\x80\x04this is no pickle")
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=r"pickle.*convert the weights with `safetensors.torch.save_file`"):
            Checkpoint.open(source)


def test_a_pickle_under_the_name_of_safetensors(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors is truncated, damaged or not safetensors"):
        Checkpoint.open(tmp_path)


def test_truncation_at_every_byte(tmp_path):
    content = save({"w": torch.arange(3.0)})
    path = tmp_path / "model.safetensors"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="copy or download it again"):
            Checkpoint.open(tmp_path)
    path.write_bytes(content + b"x")
    with pytest.raises(ValueError, match="copy or download it again"):
        Checkpoint.open(tmp_path)


def test_a_file_damaged_after_it_was_opened(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    checkpoint = Checkpoint.open(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"a\.weight cannot be read from .*copy or download it again"):
        checkpoint.tensor("a.weight")


def test_a_pointer_of_git_lfs(tmp_path):
    (tmp_path / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    )
    with pytest.raises(ValueError, match="is a pointer of git LFS, not the file itself"):
        Checkpoint.open(tmp_path)


def test_a_name_twice_in_one_header(tmp_path):
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    with_header(tmp_path / "model.safetensors", f'{{"w":{entry},"w":{entry}}}', bytes(4))
    with pytest.raises(ValueError, match="'w' is stored twice"):
        Checkpoint.open(tmp_path)


def test_overlapping_tensors(tmp_path):
    entries = (
        '"v":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}'
    )
    with_header(tmp_path / "model.safetensors", f"{{{entries}}}", bytes(6))
    with pytest.raises(ValueError, match="truncated, damaged or not safetensors"):
        Checkpoint.open(tmp_path)


def test_types_that_torch_does_not_have(tmp_path):
    header = '{"w":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    with_header(tmp_path / "model.safetensors", header, bytes(3))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.stored_dtype("w") == "F6_E2M3"
    with pytest.raises(ValueError, match="stored as F6_E2M3, a type that torch cannot hold"):
        checkpoint.tensor("w")


def test_no_tensors(tmp_path):
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no tensors"):
        Checkpoint.open(tmp_path)


def test_an_empty_folder_and_a_missing_one(tmp_path):
    with pytest.raises(ValueError, match="holds no safetensors file: give the folder"):
        Checkpoint.open(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"missing' does not exist: give a checkpoint's folder"):
        Checkpoint.open(tmp_path / "missing")


def test_other_files_given_directly(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="the index of a sharded checkpoint: give its folder"):
        Checkpoint.open(tmp_path / "model.safetensors.index.json")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"is not named \*.safetensors"):
        Checkpoint.open(tmp_path / "notes.txt")


def test_an_index_that_names_a_missing_file(tmp_path):
    folder = shard(tmp_path / "m", {"one.safetensors": ["b.weight"], "two.safetensors": ["a.weight"]})
    (folder / "two.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names files that are not there: two.safetensors"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"b.weight": "one.safetensors", "z": "one.safetensors"}, "places z in one.safetensors, but no file has it"),
        (
            {"b.weight": "two.safetensors", "a.weight": "two.safetensors"},
            "places b.weight in two.safetensors, but no file has it",
        ),
        (
            {"b.weight": "two.safetensors", "a.weight": "one.safetensors"},
            "places b.weight in two.safetensors, but it is in one.safetensors",
        ),
        ({"b.weight": "one.safetensors", "c.weight": "two.safetensors"}, "c.weight in two.safetensors, but no file"),
        ({"b.weight": "../one.safetensors"}, "not the name of a safetensors file in the same folder"),
        ({"b.weight": "pytorch_model.bin"}, "not the name of a safetensors file in the same folder"),
        ({"b.weight": 3}, "`weight_map` must map tensor names to file names"),
        ({"a.weight": "two.safetensors"}, None),
    ],
)
def test_an_index_that_disagrees_with_its_shards(tmp_path, weight_map, message):
    folder = shard(tmp_path / "m", {"one.safetensors": ["b.weight"], "two.safetensors": ["a.weight"]}, weight_map)
    if message is None:
        # files that the index does not name are not part of the checkpoint
        assert Checkpoint.open(folder).names == ["a.weight"]
        return
    with pytest.raises(ValueError, match=message):
        Checkpoint.open(folder)


def test_a_tensor_that_the_index_does_not_name(tmp_path):
    folder = shard(tmp_path / "m", {"one.safetensors": ["b.weight", "a.weight"]}, {"b.weight": "one.safetensors"})
    with pytest.raises(ValueError, match=r"one.safetensors holds a.weight, which the index .* does not name"):
        Checkpoint.open(folder)


def test_a_tensor_in_two_shards(tmp_path):
    placement = {"one.safetensors": ["b.weight", "a.weight"], "two.safetensors": ["a.weight"]}
    folder = shard(tmp_path / "m", placement)
    with pytest.raises(ValueError, match=r"a\.weight is stored twice, in one.safetensors and in two.safetensors"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', "\x00"])
def test_a_broken_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="index"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "must hold a JSON object")])
def test_a_broken_config(tmp_path, text, message):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Checkpoint.open(tmp_path)


HUB = """
import json, sys
import torch
from hf_lip.checkpoints.source import Checkpoint

for request in sys.argv[1:]:
    try:
        checkpoint = Checkpoint.open(*request.split("@"))
    except (ValueError, OSError) as error:
        print(json.dumps([type(error).__name__, str(error)]))
    else:
        sums = {name: checkpoint.tensor(name).double().sum().item() for name in sorted(checkpoint.names)}
        files = [file.name for file in checkpoint.files]
        print(json.dumps([checkpoint.folder.name, files, checkpoint.config, sums]))
"""


def test_from_the_hub(tmp_path):
    old, new = ({name: tensor * factor for name, tensor in TENSORS.items()} for factor in (1, 2))
    sums = [{name: tensors[name].double().sum().item() for name in sorted(tensors)} for tensors in (old, new)]
    weight_map = {"b.weight": "model-1.safetensors", "a.weight": "model-2.safetensors"}
    shards = {file: save({name: TENSORS[name]}) for name, file in weight_map.items()}
    index = json.dumps({"weight_map": weight_map}).encode()
    with HubEndpoint() as hub:
        files = {"config.json": b"{}", "model.safetensors": save(old), "pytorch_model.bin": b"pickle"}
        first = hub.commit("owner/plain", files, "first")
        second = hub.commit("owner/plain", {"model.safetensors": save(new), "onnx/big.safetensors": b""}, "second")
        files = {**shards, "consolidated.safetensors": save(TENSORS), "model.safetensors.index.json": index}
        third = hub.commit("owner/sharded", files, "shards")
        hub.commit("owner/pickles", {"pytorch_model.bin": b"pickle"}, "pickles")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment = inherited | {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT),
            "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost",
        }  # fmt: skip
        requests = ["owner/plain", f"owner/plain@{first.sha}", "owner/sharded", "owner/pickles", "owner/none"]
        words = [sys.executable, "-c", HUB, *requests]
        result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    latest, pinned, sharded, pickles, none = map(json.loads, result.stdout.splitlines())
    assert latest == [second.sha, ["model.safetensors"], {}, sums[1]]
    assert pinned == [first.sha, ["model.safetensors"], {}, sums[0]]
    assert sharded == [third.sha, sorted(shards), None, {"a.weight": 6.0, "b.weight": 15.0}]
    assert pickles[0] == "ValueError"
    assert "owner/pickles holds no safetensors file in its top folder" in pickles[1]
    assert none[0] == "RepositoryNotFoundError"
    fetched = {path for _, path, _ in hub.requests if "/resolve/" in path}
    assert not any(word in path for path in fetched for word in (".bin", "consolidated", "onnx"))
