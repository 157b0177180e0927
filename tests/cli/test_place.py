"""Where results may go: names of each form, what is kept, and flags that would be without effect."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import tiny_models as tiny

import entrenar as en
from entrenar import LoraConfig
from entrenar.cli import main
from entrenar.errors import ConfigError, UsageError
from entrenar.formats import gguf_read

pytestmark = pytest.mark.tier2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model as GGUF and as a directory, and an adapter of it."""
    folder = tmp_path_factory.mktemp("place")
    model = tiny.model(lora=LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_adapter(folder / "adapter")
    model.unload_adapter()
    model.save(folder / "model.gguf")
    model.save(folder / "hf")
    (folder / "dir.gguf").mkdir()
    return folder


def run(capsys, words, folder):
    code = main([word.replace("@", f"{folder}/") for word in words.split()])
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("convert --model @model.gguf --out @out.safetensors", "safetensors files are not written alone"),
        ("convert --model @model.gguf --out @pytorch_model.BIN", "bin files are not written alone"),
        ("convert --model @model.gguf --adapter @adapter --out @a.safetensors", "not written alone"),
        ("convert --model @model.gguf --out @dir.gguf --force", "dir.gguf is a directory"),
        ("merge --model @model.gguf --adapter @adapter --out @m-00002-of-00003.gguf", "the name of a part of a model"),
        ("convert --model @hf --out @model.gguf/ --adapter @adapter", "exists"),
        ("convert --model @model.gguf --out @hf/config.json --force", "config.json is a file"),
        ("convert --model @model.gguf --adapter @adapter --out @model.gguf --force", "would take the place of"),
        ("convert --model @hf --adapter @adapter --out @hf --force", "would take the place of"),
        ("convert --model @hf --adapter @adapter --out @adapter --force", "would take the place of"),
        ("merge --model @hf --adapter @adapter --out @adapter --force", "would take the place of"),
        ("merge --model @model.gguf --base @hf --adapter @adapter --out @hf --force", "would take the place of"),
        ("convert --model @model.gguf --adapter @adapter --out @a.gguf --quant q4_k", "--quant is of a model's"),
        ("convert --model @model.gguf --adapter @adapter --out @a.gguf --dtype f16", "--dtype is of a model's"),
        ("convert --model @model.gguf --out @a.gguf --quant q8_0 --dtype f32", "dtype: 'f32' beside quant 'q8_0'"),
        ("merge --model @model.gguf --adapter @adapter --out @a.gguf --quant q8_0 --dtype f32", "dtype: 'f32' beside"),
        ("merge --model @model.gguf --adapter @adapter --out @dir.gguf", "dir.gguf is a directory"),
        ("merge --model @model.gguf --adapter @adapter --out @m.gguf --quant nf4", "'nf4' is no type of GGUF files"),
        ("quantize --model @model.gguf --out @q --quant q8_0", "give a name ending in .gguf"),
        ("quantize --model @model.gguf --out @q.bin --quant q8_0", "bin files are not written alone"),
    ],
)
def test_what_would_lose_or_ignore_something_is_refused_before_anything_is_read(
    folder, capsys, monkeypatch, words, said
):
    def read(path):
        raise AssertionError(f"{path} was opened")

    monkeypatch.setattr("entrenar.models.load.open_model", read)
    before = sorted(folder.rglob("*"))
    code, err = run(capsys, words, folder)
    assert code == 2, err
    assert said in err
    assert len(err.splitlines()) == 1
    assert sorted(folder.rglob("*")) == before


def test_a_suffix_counts_in_any_case(folder, tmp_path, capsys):
    for words, name in (
        ("convert --model @hf --out", "M.GGUF"),
        ("convert --model @hf --adapter @adapter --out", "A.Gguf"),
        ("quantize --model @hf --quant Q8_0 --out", "Q.GGUF"),
    ):
        assert run(capsys, f"{words} {tmp_path / name}", folder)[0] == 0
        assert gguf_read.read(tmp_path / name).tensors
    back = en.load(tmp_path / "M.GGUF")
    for (name, a), (_, b) in zip(back.named_weights(), en.load(folder / "hf").named_weights(), strict=True):
        assert np.array_equal(a.data, b.data), name


def test_a_model_may_be_replaced_by_its_merged_self(folder, tmp_path, capsys):
    path = tmp_path / "m.gguf"
    path.write_bytes((folder / "model.gguf").read_bytes())
    words = f"merge --model {path} --adapter @adapter --out {path}"
    assert run(capsys, words, folder)[0] == 2
    assert run(capsys, f"{words} --force", folder)[0] == 0
    assert path.read_bytes() != (folder / "model.gguf").read_bytes()
    en.load(path)


TERMINATED_WHILE_WRITING = """
import signal, sys
from entrenar.cli import main
from entrenar.models.save import Content

values = Content.values

def interrupted(self, name, *args):
    if "layers.1" in name:
        signal.raise_signal(signal.SIGTERM)
    return values(self, name, *args)

Content.values = interrupted
main()
"""


def test_a_terminated_command_leaves_no_half_of_a_file(folder, tmp_path):
    words = ["convert", "--model", str(folder / "hf"), "--out", str(tmp_path / "m.gguf")]
    done = subprocess.run([sys.executable, "-c", TERMINATED_WHILE_WRITING, *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "")
    assert list(tmp_path.iterdir()) == []


def test_in_python_too(tmp_path):
    model = tiny.model()
    with pytest.raises(UsageError, match="not written alone"):
        model.save(tmp_path / "m.safetensors")
    with pytest.raises(ConfigError, match="decides the type of every weight"):
        model.save(tmp_path / "m.gguf", quant="q8_0", dtype="f16")
    assert list(tmp_path.iterdir()) == []
