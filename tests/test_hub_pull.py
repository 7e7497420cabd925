# SPDX-License-Identifier: Apache-2.0
"""What was pushed is loaded by its name, in fresh processes with fresh caches: with `import hf_lip`, and without it
through the shim; and models push themselves."""

import hashlib
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load
from transformers import GPT2Config, pipeline

import hf_lip
from hf_lip.assets import DEFAULT_MODEL_DIR
from hf_lip.hub import push_folder
from hf_lip.models.certificate import CERTIFICATE_NAME, weights_sha256
from hf_lip.models.chacal.converted import ChacalGPT2Config, ChacalGPT2LMHeadModel
from hf_lip.models.shim import SHIM_NAME

from .hub_endpoint import Fault, Handler, HubEndpoint, connect, run_fresh


COMMON = """
import json, os, sys
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageClassification, pipeline

IMAGE = Image.new("L", (8, 8), 77)
PIXELS = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
TOKENS = torch.arange(12).reshape(2, 6)
seen = {}


def described(model):
    with torch.no_grad():
        output = model.eval()(pixel_values=PIXELS)
    return [model.certificate.weights_sha256, output.logits.tolist(), output.certified_radius.tolist()]


def refused(load, *arguments, **settings):
    try:
        load(*arguments, **settings)
    except (OSError, ValueError, ImportError) as error:
        return f"{type(error).__name__}: {error}"
    return "was loaded"
"""

WITH_IMPORT = """
import hf_lip
from huggingface_hub import get_safetensors_metadata, snapshot_download
from typer.testing import CliRunner
from hf_lip.cli import app

load = AutoModelForImageClassification.from_pretrained
seen["main"] = described(load("owner/digits"))
# reads no more than the header, by a range
seen["parameters"] = get_safetensors_metadata("owner/digits").parameter_count
seen["v2"] = described(load("owner/digits", revision="v2"))
# nothing of the repository is run, whatever is allowed
seen["trusted"] = described(load("owner/digits", trust_remote_code=True))
seen["remote code was fetched"] = "transformers_modules" in sys.modules
seen["pipeline"] = pipeline("certify", model="owner/digits", revision="v2", device="cpu")(IMAGE)
model = AutoModelForCausalLM.from_pretrained("owner/chains").eval()
seen["chains"] = model(TOKENS).logits.tolist()
seen["generated"] = model.generate(TOKENS, max_new_tokens=4, do_sample=False).tolist()
# before it is in the cache
seen["errors"] = {"private": refused(load, "owner/secret")}
seen["private"] = described(load("owner/secret", token=sys.argv[1]))
seen["pushed"] = [described(load(f"owner/{name}")) for name in ("pushed", "saved")]
seen["moving"] = load("owner/moving").certificate.weights_sha256
seen["verified"] = hf_lip.verify_checkpoint(snapshot_download("owner/digits")).reasons
done = CliRunner().invoke(app, ["certify", "owner/digits", "--limit", "4", "--out", "certified"])
seen["certify"] = [done.exit_code, done.output, len(open("certified/certificates.tsv").readlines())]
words = ["certify", "owner/digits", "--revision", "v2", "--limit", "4", "--out", "certified_v2"]
done = CliRunner().invoke(app, words)
summary = json.load(open("certified_v2/summary.json"))
seen["certify v2"] = [done.exit_code, summary["weights_sha256"], summary["revision"], summary["command"]]
words[3] = "v9"
seen["errors"]["revision of certify"] = CliRunner().invoke(app, words).output
seen["errors"] |= {
    "revision": refused(load, "owner/digits", revision="v9"),
    "revision of the pipeline": refused(pipeline, "certify", model="owner/digits", revision="v9"),
    "repository": refused(load, "owner/absent"),
    "wrong token": refused(AutoModelForCausalLM.from_pretrained, "owner/converted", token="hf_wrong"),
    "tampered": refused(load, "owner/tampered"),
    "tampered, own class": refused(hf_lip.LipschitzVisionForImageClassification.from_pretrained, "owner/tampered"),
    "tampered, pipeline": refused(pipeline, "certify", model="owner/tampered"),
    "tampered config": refused(load, "owner/reconfigured"),
}
json.dump(seen, open("seen.json", "w"))
"""

WITHOUT_IMPORT = """
import importlib.abc


class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_lip":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


load = AutoModelForImageClassification.from_pretrained
seen["errors"] = {"untrusted": refused(load, "owner/digits", trust_remote_code=False)}
absent = Absent()
sys.meta_path.insert(0, absent)
seen["errors"]["not installed"] = refused(load, "owner/digits", trust_remote_code=True)
sys.meta_path.remove(absent)
assert "hf_lip" not in sys.modules

trusted = {"trust_remote_code": True}
certify = pipeline("certify", model="owner/digits", revision="v2", device="cpu", **trusted)
seen["pipeline"] = certify(IMAGE)
seen["main"] = described(load("owner/digits", **trusted))
seen["v2"] = described(load("owner/digits", revision="v2", **trusted))
seen["chains"] = AutoModelForCausalLM.from_pretrained("owner/chains", **trusted).eval()(TOKENS).logits.tolist()
seen["converted"] = AutoModelForCausalLM.from_pretrained("owner/converted", **trusted).eval()(TOKENS).logits.tolist()
seen["errors"]["tampered"] = refused(load, "owner/tampered", **trusted)
# saved again, they are as any other checkpoint of the package
load("owner/digits", **trusted).save_pretrained("again")
AutoModelForCausalLM.from_pretrained("owner/converted", **trusted).save_pretrained("again_converted")
seen["saved"] = sorted(os.listdir("again")) + sorted(os.listdir("again_converted"))
seen["mapped"] = ["auto_map" in open(f"{name}/config.json").read() for name in ("again", "again_converted")]
seen["again"] = described(load("again"))
json.dump(seen, open("seen.json", "w"))
"""

PUSH = """
processor = {}
# transformers 5.17 has it only together with torchvision
if not hasattr(AutoImageProcessor, "_backends"):
    # the first to import the package, through the shim
    loaded = AutoImageProcessor.from_pretrained("owner/digits", trust_remote_code=True)
    loaded.save_pretrained("processor")
    processor = json.load(open("processor/preprocessor_config.json"))
    processor["files"] = os.listdir("processor")

from hf_lip import ChacalForCausalLM, LipschitzVisionForImageClassification

model = LipschitzVisionForImageClassification.from_pretrained(sys.argv[1])
pushed = model.push_to_hub("owner/pushed", commit_message="by push_to_hub", tags=["certified"])
model.save_pretrained("saved", push_to_hub=True, repo_id="owner/saved", commit_message="by save_pretrained")
chains = ChacalForCausalLM.from_pretrained(sys.argv[2])
chains.push_to_hub("owner/chains-pushed", revision="v2", private=True)
chains.save_pretrained("chains-saved", push_to_hub=True)
errors = [
    refused(model.push_to_hub, "not a name"),
    refused(model.push_to_hub, "owner/x", token="hf_wrong"),
    refused(model.push_to_hub, "owner/pushed", private=True),
]
seen = [pushed.commit_url, os.listdir("saved"), os.listdir("chains-saved"), errors, processor]
json.dump(seen, open("seen.json", "w"))
"""


@pytest.fixture(scope="module")
def hub():
    with HubEndpoint() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def fresh(hub, tmp_path_factory):
    """Run a script in a fresh process, with a cache and a folder of its own; returns what it left in seen.json."""

    def run(script, *words, token=None):
        home = tmp_path_factory.mktemp("fresh")
        done = run_fresh(hub, home, "-c", f"import os\nos.chdir({str(home)!r})\n{COMMON}{script}", *words, token=token)
        assert done.returncode == 0, done.stderr
        return json.loads((home / "seen.json").read_text())

    return run


def other_weights(folder, number):
    """The embedded model, with a bias of its own, certified."""
    shutil.copytree(DEFAULT_MODEL_DIR, folder, ignore=shutil.ignore_patterns("__pycache__"))
    model = hf_lip.LipschitzVisionForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        model.get_parameter("classifier.bias")[0] += number / 8
    model.save_pretrained(folder)
    return folder


def large_object(hub, repo, revision="main"):
    """The hash by which the weights of a repository are stored."""
    return hashlib.sha256(hub.find(repo, revision).files["model.safetensors"]).hexdigest()


@pytest.fixture(scope="module")
def folders(hub, tmp_path_factory):
    """What was pushed from where."""
    root = tmp_path_factory.mktemp("folders")
    found = {
        name: other_weights(root / name, number) for number, name in enumerate(("main", "v2", "moving", "broken"))
    }
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    chains = hf_lip.ChacalForCausalLM(
        hf_lip.ChacalConfig(**sizes, intermediate_size=32, bos_token_id=1, eos_token_id=2)
    )
    chains.save_pretrained(root / "chains")
    tiny = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    converted = ChacalGPT2Config(**{**tiny.to_dict(), "model_type": "chacal_gpt2", "chain_gamma": 0.5})
    ChacalGPT2LMHeadModel(converted).save_pretrained(root / "converted")
    found |= {name: root / name for name in ("chains", "converted")}
    with pytest.MonkeyPatch.context() as patch:
        connect(patch, hub, hub.token)
        push_folder(found["main"], "owner/digits")
        push_folder(found["v2"], "owner/digits", revision="v2")
        push_folder(found["main"], "owner/secret", private=True)
        for name in ("moving", "chains", "converted"):
            push_folder(found[name], f"owner/{name}")
        for name in ("tampered", "reconfigured"):
            push_folder(found["broken"], f"owner/{name}")
    tamper(hub)
    return found


def tamper(hub):
    """Change a weight where it is stored, behind the hash it is known by, and a field of a config."""
    oid = large_object(hub, "owner/tampered")
    stored = hub.lfs_objects[oid]
    hub.lfs_objects[oid] = stored[:-1] + bytes([stored[-1] ^ 1])
    config = json.loads(hub.find("owner/reconfigured").files["config.json"])
    weights = hub.find("owner/digits", "v2").files["model.safetensors"]
    certificate = hub.find("owner/digits", "v2").files[CERTIFICATE_NAME]
    files = {"model.safetensors": weights, CERTIFICATE_NAME: certificate}
    files["config.json"] = json.dumps({**config, "image_std": [2.0]}).encode()
    hub.commit("owner/reconfigured", files, "tampered")


@pytest.fixture(scope="module")
def expected(folders):
    """What the folders give in this process."""
    pixels = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    tokens = torch.arange(12).reshape(2, 6)
    found = {}
    with torch.no_grad():
        for name in ("main", "v2"):
            model = hf_lip.LipschitzVisionForImageClassification.from_pretrained(folders[name]).eval()
            output = model(pixel_values=pixels)
            digest = weights_sha256(load((folders[name] / "model.safetensors").read_bytes()))
            found[name] = [digest, output.logits.tolist(), output.certified_radius.tolist()]
        chains = hf_lip.ChacalForCausalLM.from_pretrained(folders["chains"]).eval()
        found["chains"] = chains(tokens).logits.tolist()
        found["generated"] = chains.generate(tokens, max_new_tokens=4, do_sample=False).tolist()
        converted = ChacalGPT2LMHeadModel.from_pretrained(folders["converted"]).eval()
        found["converted"] = converted(tokens).logits.tolist()
    found["pipeline"] = pipeline("certify", model=str(folders["v2"]), device="cpu")(Image.new("L", (8, 8), 77))
    return found


@pytest.fixture(scope="module")
def pushed(hub, folders, fresh):
    """What a process said that pushed models by their own methods."""
    return fresh(PUSH, folders["main"], folders["chains"], token=hub.token)


def test_models_push_themselves_with_certificate_and_shim(hub, folders, pushed):
    url, saved, chains_saved, errors, processor = pushed
    own = {"config.json", "model.safetensors"}
    assert set(saved) == {*own, CERTIFICATE_NAME}
    assert set(chains_saved) == {*own, "generation_config.json"}
    for repo, message in (("owner/pushed", "by push_to_hub"), ("owner/saved", "by save_pretrained")):
        assert [commit.message for commit in hub.repos[repo]] == ["initial commit", message]
        files = hub.find(repo).files
        assert set(files) == {".gitattributes", "README.md", SHIM_NAME, CERTIFICATE_NAME, *own}
        for name in ("model.safetensors", CERTIFICATE_NAME):
            assert files[name] == (folders["main"] / name).read_bytes()
        assert json.loads(files["config.json"])["auto_map"]["AutoModelForImageClassification"].startswith("modeling_")
    assert url == f"{hub.url}/owner/pushed/commit/{hub.find('owner/pushed').sha}"
    assert b"- certified" in hub.find("owner/pushed").files["README.md"]
    for repo, revision in (("owner/chains-pushed", "v2"), ("owner/chains-saved", "main")):
        files = hub.find(repo, revision).files
        assert set(files) == {".gitattributes", "README.md", "generation_config.json", SHIM_NAME, *own}
    assert set(hub.find("owner/chains-pushed").files) == {".gitattributes"}
    assert hub.repositories["owner/chains-pushed"].private
    for error, message in zip(
        errors, ("not the name of a Hub repository", "Invalid user token", "exists and is public")
    ):
        assert message in error
    assert "owner/x" not in hub.repos
    if processor:
        assert processor.pop("files") == ["preprocessor_config.json"]
        assert processor == json.loads((folders["main"] / "preprocessor_config.json").read_text())


def test_with_import(hub, folders, expected, pushed, fresh, monkeypatch):
    moving = large_object(hub, "owner/moving")
    download = Handler.lfs_download

    def push_during_download(handler, oid):
        if oid == moving and len(hub.repos["owner/moving"]) == 2:
            hub.commit("owner/moving", {CERTIFICATE_NAME: b"{}"}, "in between")
        return download(handler, oid)

    monkeypatch.setattr(Handler, "lfs_download", push_during_download)
    digits, second = large_object(hub, "owner/digits"), large_object(hub, "owner/digits", "v2")
    hub.faults.downloads += [Fault(f"GET /lfs/{digits}", after=100_000), Fault(f"GET /lfs/{second}", pause=0.01)]
    hub.requests.clear()
    seen = fresh(WITH_IMPORT, hub.token)
    for name in ("main", "v2", "chains", "generated", "pipeline"):
        assert seen[name] == expected[name]
    assert seen["v2"] != seen["main"]
    for again in (seen["trusted"], seen["private"], *seen["pushed"]):
        assert again == expected["main"]
    assert not seen["remote code was fetched"]
    assert seen["pipeline"]["method"] == "lipschitz"
    assert seen["pipeline"]["radius"] >= 0
    # the download that ended early was not taken for the file
    assert [status for _, path, status in hub.requests if path == f"/lfs/{digits}"][:3] == [200, 200, 206]
    weights = load((folders["main"] / "model.safetensors").read_bytes())
    assert seen["parameters"] == {"F32": sum(tensor.numel() for tensor in weights.values())}
    assert seen["moving"] == weights_sha256(load((folders["moving"] / "model.safetensors").read_bytes()))
    assert hub.repos["owner/moving"][-1].message == "in between"
    assert seen["verified"] == []
    code, output, lines = seen["certify"]
    assert (code, lines) == (0, 5), output
    assert "owner/digits on digits (test, 4 images)" in output
    assert seen["certify v2"] == [
        0, expected["v2"][0], "v2", "hf-lip certify owner/digits --revision v2 --limit 4 --out certified_v2"
    ]  # fmt: skip
    errors = seen["errors"]
    for name in ("revision", "revision of the pipeline", "revision of certify"):
        assert "v9 is not a valid git identifier" in errors[name]
    for name, repo in (("repository", "owner/absent"), ("private", "owner/secret")):
        assert f"{repo} is not a local folder and is not a valid model identifier" in errors[name]
    assert "401" in errors["wrong token"]
    for name in ("tampered", "tampered, own class", "tampered, pipeline"):
        assert errors[name].startswith("ValueError: The weights in owner/tampered have sha256"), errors[name]
    assert (
        f"config.json in owner/reconfigured says image_std=[2.0], its {CERTIFICATE_NAME} is for"
        in (errors["tampered config"])
    )


def test_without_import(expected, fresh):
    seen = fresh(WITHOUT_IMPORT)
    for name in ("main", "v2", "chains", "converted", "pipeline"):
        assert seen[name] == expected[name]
    assert "contains custom code which must be executed" in seen["errors"]["untrusted"]
    assert "pip install hf_lip" in seen["errors"]["not installed"]
    assert "The weights in owner/tampered have sha256" in seen["errors"]["tampered"]
    assert SHIM_NAME not in seen["saved"]
    assert not [name for name in seen["saved"] if name.endswith(".py")]
    assert seen["mapped"] == [False, False]
    assert seen["again"] == expected["main"]
