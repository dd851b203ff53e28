"""What is fetched from the Hub, and what is found in its cache when there is no network."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import filter_repo_objects
from oracles import llama
from tiny_tokenizer import byte_tokenizer

import lorax
from lorax.errors import EnvironmentProblem, FormatError
from lorax.formats.hub import find_adapter_dir, find_model
from lorax.formats.tokenizer_files import write_tokenizer

MISTRAL_REPO = {
    "additional_chat_templates/tool_use.jinja": True,
    "additional_chat_templates/model.safetensors": False,
    "add/model.safetensors": False,
    "additional/config.json": False,
    "additional_chat_templates_old/model.safetensors": False,
    # what published repositories hold, and whether a reader needs it
    "config.json": True,
    "generation_config.json": True,
    "model-00001-of-00002.safetensors": True,
    "model-00002-of-00002.safetensors": True,
    "model.safetensors.index.json": True,
    "tokenizer.json": True,
    "tokenizer_config.json": True,
    "special_tokens_map.json": True,
    "chat_template.jinja": True,
    "tokenizer.model": True,
    "README.md": True,
    "LICENSE": True,
    "LICENSE.txt": True,
    "NOTICE": True,
    "consolidated.safetensors": False,
    "consolidated.00.pth": False,
    "params.json": False,
    "original/consolidated.00.pth": False,
    "original/params.json": False,
    "original/model.safetensors": False,
    "onnx/model.onnx": False,
    "onnx/config.json": False,
    "model.fp16.safetensors": False,
    "pytorch_model.bin": False,
    "pytorch_model.bin.index.json": False,
    "tf_model.h5": False,
    "rust_model.ot": False,
    "trainer_state.json": False,
    "training_args.bin": False,
    "adapter_config.json": False,
    "adapter_model.safetensors": False,
    ".gitattributes": False,
}
ADAPTER_REPO = {
    "additional_chat_templates/tool_use.jinja": True,
    "adapter_config.json": True,
    "adapter_model.safetensors": True,
    "tokenizer.json": True,
    "tokenizer_config.json": True,
    "chat_template.jinja": True,
    "added_tokens.json": True,
    "adapter_model.bin": False,
    "optimizer.pt": False,
    "training_args.bin": False,
    "model.safetensors": False,
    "config.json": False,
    "checkpoint-50/adapter_model.safetensors": False,
    "checkpoint-50/adapter_config.json": False,
    "runs/a/events.out": False,
    "german/adapter_config.json": True,
    "german/adapter_model.safetensors": True,
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Calls of snapshot_download, which gives an empty directory."""
    calls = []

    def snapshot_download(repo_id, **options):
        calls.append((repo_id, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


@pytest.mark.parametrize(
    ("find", "repository"), [(find_model, MISTRAL_REPO), (find_adapter_dir, ADAPTER_REPO)]
)
@pytest.mark.parametrize("revision", [None, "main", "0123abc"])
def test_only_what_is_read_or_kept_is_fetched(find, repository, revision, hub, tmp_path):
    assert find("someone/something", revision) == tmp_path
    ((name, options),) = hub
    assert (name, options.pop("revision")) == ("someone/something", revision)
    assert set(options) == {"allow_patterns", "ignore_patterns"}
    wanted = set(filter_repo_objects(list(repository), **options))
    assert wanted == {file for file, is_needed in repository.items() if is_needed}


@pytest.mark.parametrize("name", ["a/b/c", "../x", "/no/such/place", "a b", "~/nothing"])
@pytest.mark.parametrize("find", [find_model, find_adapter_dir])
def test_what_is_no_id_is_not_asked_for(find, name, hub):
    with pytest.raises(EnvironmentProblem, match="no Hub id"):
        find(name)
    assert not hub


def test_what_is_here_is_not_asked_for(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    for find in (find_model, find_adapter_dir):
        assert find("~/mine") == find(tmp_path / "mine") == tmp_path / "mine"
    assert not hub


def test_a_hub_model_without_safetensors_says_how_to_convert_it(hub, tmp_path):
    llama().config.save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="path = 'someone/old'"):
        lorax.load_model("someone/old")


def cached(cache: Path, name: str, files: Path, revision: str, commit: str) -> None:
    """Put files into huggingface_hub's cache, in its layout: blobs, links to them, a ref."""
    home = cache / repo_folder_name(repo_id=name, repo_type="model")
    for part in ("blobs", "refs", f"snapshots/{commit}"):
        (home / part).mkdir(parents=True, exist_ok=True)
    (home / "refs" / revision).write_text(commit)
    for file in files.iterdir():
        blob = home / "blobs" / f"{commit}-{file.name}"
        shutil.copyfile(file, blob)
        (home / "snapshots" / commit / file.name).symlink_to(os.path.relpath(
            blob, home / "snapshots" / commit
        ))  # fmt: skip


OFFLINE = """
import sys, torch, lorax
from lorax.formats.hub import find_adapter_dir
model = lorax.load_model("someone/tiny", revision=sys.argv[1])
where = find_adapter_dir("someone/adapter")
assert (where / "adapter_config.json").is_file(), where
assert not (find_adapter_dir("someone/tiny", sys.argv[1]) / "adapter_config.json").exists()
lorax.load_adapter(model, where)
print(lorax.load_tokenizer("someone/tiny", revision=sys.argv[1]).encode("ab"))
ids = torch.arange(20)[None]
torch.save(model(ids), sys.argv[2])
lorax.save_model(lorax.load_model("someone/tiny", revision=sys.argv[1]), sys.argv[3])
try:
    lorax.load_model("someone/else")
except lorax.errors.EnvironmentProblem as error:
    print(error)
"""


@pytest.mark.slow
def test_offline_the_cache_is_enough(tmp_path):
    theirs = llama()
    theirs.save_pretrained(tmp_path / "base")
    write_tokenizer(byte_tokenizer(), tmp_path / "base")
    (tmp_path / "base" / "LICENSE").write_text("theirs")
    model = lorax.load_model(tmp_path / "base")
    lorax.add_adapter(model, lorax.LoRAConfig(r=2, target_modules=["q_proj"]))
    lorax.save_adapter(model, tmp_path / "adapter")
    cache = tmp_path / "cache"
    cached(cache, "someone/tiny", tmp_path / "base", "v2", "a" * 40)
    cached(cache, "someone/adapter", tmp_path / "adapter", "main", "b" * 40)
    run = [sys.executable, "-c", OFFLINE, "v2", tmp_path / "logits", tmp_path / "saved"]
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(run, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.strip().splitlines()
    assert first == str(byte_tokenizer().encode("ab"))
    assert last.startswith("someone/else: no such directory here, and the Hub did not give it")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert (torch.load(tmp_path / "logits") - theirs(ids).logits).abs().max() <= 1e-5
    assert (tmp_path / "saved" / "LICENSE").read_text() == "theirs"
    assert not (tmp_path / "saved" / "LICENSE").is_symlink()
