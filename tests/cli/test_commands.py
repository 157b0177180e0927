"""Every command on a tiny model, through `main`: what it prints, what it leaves behind, and how it refuses."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import entrenar as en
from entrenar.cli import main
from entrenar.cli.adapter import targets
from entrenar.observe import Event, subscribed
from entrenar.tokenizer import from_characters

TEXT = "the cat sat on the mat. the dog sat on the log. " * 20
TRAINING = ["--max-steps", "4", "--batch-size", "2", "--seq-len", "16", "--log-every", "2"]
SHAPE = ["--hidden-size", "16", "--num-hidden-layers", "1", "--num-attention-heads", "2", "--tokenizer", "char"]


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out, err


def result(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, object]:
    code, out, err = run(capsys, *args, "--json")
    assert code == 0, err
    (line,) = out.splitlines()
    return dict(json.loads(line))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of a model with random weights and the characters of `TEXT`."""
    tokenizer = from_characters(TEXT)
    model = en.CausalLM.from_config(
        en.ModelConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
        ),
        seed=3,
    )
    model.tokenizer = tokenizer
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    model.save(path)
    return path


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def adapter(base: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter") / "run"
    model = ["--model", str(base), "--data", str(text_file), "--out", str(out)]
    assert main(["finetune", *model, *TRAINING, "--lr", "0.05", "--rank", "2"]) == 0
    return out / "adapter"


# ---- generate, chat, tokenize


@pytest.mark.tier2
def test_generate_prints_the_text_and_nothing_else(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--prompt", "the cat", "--max-new-tokens", "12", "--temperature", "0.9", "--seed", "5"]
    code, out, err = run(capsys, "generate", "--model", base, *settings)
    assert (code, err) == (0, "")
    expected = en.load(base).generate("the cat", 12, temperature=0.9, seed=5)
    assert out == expected.text
    found = result(capsys, "generate", "--model", base, *settings)
    assert found["text"] == expected.text
    assert found["ids"] == expected.ids
    assert found["new_tokens"] == len(expected.ids)
    assert found["prompt_tokens"] == len(expected.prompt_ids)


@pytest.mark.tier2
def test_generate_reads_the_prompt_from_standard_input(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("the dog"))
    _, piped, _ = run(capsys, "generate", "--model", base, "--prompt", "-", "--max-new-tokens", "8")
    _, given, _ = run(capsys, "generate", "--model", base, "--prompt", "the dog", "--max-new-tokens", "8")
    assert piped == given


@pytest.mark.tier2
def test_stop_strings_end_the_text(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, whole, _ = run(capsys, "generate", "--model", base, "--prompt", "the", "--max-new-tokens", "20")
    stop = whole[5:7]
    _, cut, _ = run(capsys, "generate", "--model", base, "--prompt", "the", "--max-new-tokens", "20", "--stop", stop)
    assert cut == whole[: whole.index(stop)]


@pytest.mark.tier2
def test_adapter_changes_the_text_as_merging_does(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = ["--prompt", "the cat", "--max-new-tokens", "16"]
    merged = tmp_path / "merged.gguf"
    assert run(capsys, "merge", "--model", base, "--adapter", adapter, "--out", merged)[0] == 0
    _, plain, _ = run(capsys, "generate", "--model", base, *prompt)
    _, adapted, _ = run(capsys, "generate", "--model", base, "--adapter", adapter, *prompt)
    _, from_merged, _ = run(capsys, "generate", "--model", merged, *prompt)
    assert adapted == from_merged != plain


@pytest.mark.tier2
def test_chat_holds_a_conversation(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def talk(*lines: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code, out, err = run(capsys, "chat", "--model", base, "--max-new-tokens", "6", "--system", "sat")
        assert code == 0
        return out, err

    once, err = talk("the cat", "/exit", "never read")
    assert len(once.splitlines()) == 1
    assert "no chat template" in err
    twice, _ = talk("the cat", "the cat")
    assert twice.splitlines()[0] == once.splitlines()[0] != twice.splitlines()[1]
    anew, err = talk("the cat", "/reset", "", "the cat", "/nonsense", "/help")
    assert anew == once * 2
    assert "there is no /nonsense" in err
    assert "/reset  forget the conversation" in err
    more, err = talk("the cat", "the cat " * 40, "/reset", "the cat")
    assert more == once * 2
    assert "the model's context holds 256; shorten it, or begin anew with /reset" in err


@pytest.mark.tier2
def test_ctrl_c_ends_an_answer_but_not_the_chat(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from entrenar.cli.chat import Command, Conversation
    from entrenar.generate import GenerationStream

    def interrupted(self: GenerationStream) -> str:
        raise KeyboardInterrupt

    model = en.load(base)
    assert model.tokenizer is not None
    talk = Conversation(model, model.tokenizer, Command(model=str(base)))
    monkeypatch.setattr(GenerationStream, "__next__", interrupted)
    talk.answer("the cat")
    assert "(stopped)" in capsys.readouterr().err
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]


@pytest.mark.tier2
def test_tokenize_lists_ids_and_pieces(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, "tokenize", "--model", base, "a cat")
    assert found["pieces"] == ["<s>", "a", "▁", "c", "a", "t"]
    assert found["count"] == 6
    _, out, _ = run(capsys, "tokenize", "--model", base, "--no-special", "a cat")
    ids = found["ids"]
    assert isinstance(ids, list)
    assert [line.split() for line in out.splitlines()] == [
        [str(i), piece] for i, piece in zip(ids[1:], "a▁cat", strict=True)
    ]


# ---- eval, convert, merge


@pytest.mark.tier2
def test_eval_is_the_mean_over_all_tokens(base: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, "eval", "--model", base, "--data", text_file, "--seq-len", "32")
    model = en.load(base)
    assert model.tokenizer is not None
    ids = [*model.tokenizer.encode(TEXT), 2]
    total = tokens = 0.0
    for start in range(0, len(ids) - 1, 31):
        window = np.array([ids[start : start + 32]])
        total += model.loss(window).item() * (window.size - 1)
        tokens += window.size - 1
    assert found["tokens"] == tokens
    assert found["nll"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(total / tokens), rel=1e-4)
    _, out, _ = run(capsys, "eval", "--model", base, "--data", text_file, "--seq-len", "32")
    assert out.startswith(f"nll {found['nll']:.4f} nats a token, perplexity ")


@pytest.mark.tier2
def test_convert_to_a_directory_and_back_is_the_identity(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "convert", "--model", base, "--out", tmp_path / "hf")[0] == 0
    assert result(capsys, "convert", "--model", tmp_path / "hf", "--out", tmp_path / "back.gguf")["parameters"]
    first, second = en.load(base), en.load(tmp_path / "back.gguf")
    for (name, a), (_, b) in zip(first.named_weights(), second.named_weights(), strict=True):
        np.testing.assert_array_equal(a.data, b.data, err_msg=name)
    assert run(capsys, "convert", "--model", base, "--out", tmp_path / "half", "--dtype", "f16")[0] == 0
    half = dict(en.load(tmp_path / "half").named_weights())
    assert half["model.layers.0.mlp.up_proj.weight"].dtype == np.float16
    assert half["model.norm.weight"].dtype == np.float32


@pytest.mark.tier2
def test_nothing_is_overwritten_without_a_word(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("precious")
    code, _, err = run(capsys, "convert", "--model", base, "--out", out)
    assert (code, err) == (2, f"entrenar convert: {out} exists; --force replaces it\n")
    assert out.read_text() == "precious"
    assert run(capsys, "convert", "--model", base, "--out", out, "--force")[0] == 0
    assert en.load(out).config.hidden_size == 16
    code, _, err = run(capsys, "convert", "--model", base, "--out", tmp_path / "no/where.gguf")
    assert code == 2
    assert "does not exist" in err


# ---- finetune, train


def test_finetune_leaves_an_adapter_and_the_record_of_the_run(adapter: Path) -> None:
    out = adapter.parent
    names = {path.name for path in out.iterdir()}
    assert names == {"adapter", "checkpoints", "loss.svg", "metrics.jsonl", "run.json", "settings.toml"}
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 2
    assert json.loads((out / "run.json").read_text())["config"]["learning_rate"] == 0.05
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [2, 4]


def test_settings_file_repeats_the_run(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again"
    found = result(capsys, "finetune", "--config", adapter.parent / "settings.toml", "--out", again)
    assert found["saved"] == str(again / "adapter")
    weights = "adapter_model.safetensors"
    assert (again / "adapter" / weights).read_bytes() == (adapter / weights).read_bytes()


def test_killed_and_resumed_ends_in_the_same_bits(
    base: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", base, "--data", text_file, "--batch-size", 2, "--seq-len", 16, "--lr", 0.01]
    settings = [*common, "--max-steps", 60, "--dropout", 0.1, "--save-every", 5, "--rank", 4]
    assert run(capsys, "finetune", *settings, "--out", tmp_path / "whole")[0] == 0
    command = [sys.executable, "-m", "entrenar.cli", "finetune", *map(str, settings)]
    part = tmp_path / "part"
    with subprocess.Popen([*command, "--out", str(part)], stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 60
        while not list(part.glob("checkpoints/step-*")) and time.monotonic() < until:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGTERM)
        _, err = process.communicate()
    assert process.returncode in (0, 143), err
    code, _, err = run(capsys, "finetune", *settings, "--out", part)
    assert (code, len(err.splitlines())) == (2, 2)  # the size of the model, then: there is a run already
    assert run(capsys, "finetune", *settings, "--out", part, "--resume")[0] == 0
    weights = "adapter/adapter_model.safetensors"
    assert (part / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_train_makes_a_model_that_loads(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    found = result(capsys, "train", "--data", text_file, "--out", out, *SHAPE, *TRAINING)
    assert isinstance(found["eval_loss"], float)
    model = en.load(out / "model")
    assert model.config.vocab_size == len(set(TEXT)) + 3
    assert model.config.intermediate_size == 64
    code, text, _ = run(capsys, "generate", "--model", out / "model", "--prompt", "the", "--max-new-tokens", "4")
    assert code == 0
    assert 1 <= len(text) <= 4  # one character a token, none for a special one


def test_train_makes_its_own_vocabulary_or_borrows_one(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "train.jsonl"
    rows = [{"prompt": f"what is {i}?", "completion": f"it is {i}."} for i in range(30)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = ["--hidden-size", "16", "--num-hidden-layers", "1", "--num-attention-heads", "2", *TRAINING]
    own = ["--data", data, "--out", tmp_path / "own", "--vocab-size", "280", "--tie-word-embeddings"]
    assert run(capsys, "train", *own, *shape)[0] == 0
    config = en.load(tmp_path / "own/model").config
    assert (config.vocab_size, config.tie_word_embeddings) == (280, True)
    borrowed = ["--data", data, "--out", tmp_path / "borrowed", "--tokenizer", base]
    assert run(capsys, "train", *borrowed, *shape)[0] == 0
    assert en.load(tmp_path / "borrowed/model").config.vocab_size == en.load(base).config.vocab_size


@pytest.mark.tier2
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("all-linear",), "all-linear"),
        (("q_proj",), ("q_proj",)),
        (("q_proj", "v_proj"), ("q_proj", "v_proj")),
        (("layers.0.mlp.up_proj",), ("layers.0.mlp.up_proj",)),
        ((r".*\.(q|k)_proj",), r".*\.(q|k)_proj"),
    ],
)
def test_targets(words: tuple[str, ...], expected: object) -> None:
    assert targets(words) == expected


def test_a_run_that_is_stopped_says_so_as_json(
    base: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(event: Event) -> None:
        if event.name == "train.step" and event.fields["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    out = tmp_path / "run"
    with subscribed(stop):
        code, said, err = run(
            capsys, "finetune", "--model", base, "--data", text_file, "--out", out, *TRAINING, "--json"
        )
    found = json.loads(said)
    assert (code, found["stopped_by"], found["steps"], found["saved"]) == (130, "SIGINT", 2, None)
    assert "stopped by SIGINT after step 2; the same command with --resume goes on" in err
    assert not (out / "adapter").exists()
    found = result(capsys, "finetune", "--config", out / "settings.toml", "--resume")
    assert (found["stopped_by"], found["steps"], found["saved"]) == (None, 4, str(out / "adapter"))


# ---- what can't be

GARBAGE = "gguf? no."


@pytest.mark.tier2
@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ("generate --model absent.gguf --prompt x", 1, "absent.gguf: no such file or directory"),
        ("generate --model NOISE --prompt x", 1, "NOISE: byte 0"),
        ("generate --model BASE --prompt x --temperature -1", 2, "temperature: -1"),
        ("generate --model BASE --prompt x --top-p 2", 2, "top_p: 2"),
        ("generate --model BASE --prompt x --max-new-tokens 0", 2, "max_new_tokens: 0"),
        ("generate --model BASE --prompt x --adapter TMP", 1, "TMP"),
        ("generate --model BASE", 2, "--prompt is needed"),
        ("chat --model NOISE", 1, "NOISE: byte 0"),
        ("tokenize --model NOISE x", 1, "NOISE: byte 0"),
        ("tokenize --model absent x", 1, "absent: no such file or directory"),
        ("tokenize --model TMP x", 2, "TMP has no tokenizer"),
        ("eval --model BASE --data absent.txt", 1, "absent.txt: no such file or directory"),
        ("eval --model BASE --data TEXT --seq-len 1", 2, "seq_len"),
        ("eval --model BASE --data TEXT --batch-size 0", 2, "batch_size: is 0"),
        ("generate --model TMP --prompt x", 1, "TMP: is no Hugging Face directory: it has no config.json"),
        ("generate --model /dev/null --prompt x", 1, "/dev/null: is not a regular file"),
        ("merge --model BASE --adapter TMP --out x.gguf", 1, "TMP"),
        ("finetune --model BASE --data CORRUPT --out RUN", 1, "CORRUPT:2: no JSON"),
        ("finetune --model BASE --data TEXT --out RUN --rank 513", 2, "rank: 513"),
        ("finetune --model BASE --data TEXT --out RUN --dropout 1", 2, "dropout: 1"),
        ("finetune --model BASE --data TEXT --out RUN --target nowhere", 1, "no linear layer"),
        ("finetune --model BASE --data TEXT --out RUN --target [", 2, "target: '['"),
        ("finetune --model BASE --data TEXT --out RUN --batch-size 0", 2, "batch_size: 0"),
        ("finetune --model BASE --data TEXT --out RUN --resume", 1, "there is no run to resume"),
        ("train --data TEXT --out RUN", 2, "hidden_size: is needed"),
        ("train --data TEXT --out RUN --preset llama-7b", 2, "did you mean llama2-7b?"),
        ("train --data TEXT --out RUN --preset llama-124m --vocab-size 10 --tokenizer char", 2, "vocab_size: 10"),
        ("train --data TEXT --out RUN --tokenizer char --hidden-size 15 --num-hidden-layers 1 "
         "--num-attention-heads 2", 2, "num_attention_heads: 2 heads"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    args: str,
    code: int,
    words: str,
    base: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"BASE": base, "TEXT": text_file, "TMP": tmp_path, "RUN": tmp_path / "run"}
    for name, content in (("NOISE", GARBAGE), ("CORRUPT", '{"text": "fine"}\n{"text": \n')):
        places[name] = tmp_path / f"{name.lower()}{'.jsonl' if name == 'CORRUPT' else '.gguf'}"
        places[name].write_text(content)
    for name, path in places.items():
        args, words = args.replace(name, str(path)), words.replace(name, str(path))
    got, out, err = run(capsys, *args.split())
    assert (got, out) == (code, ""), err
    lines = [line for line in err.splitlines() if not line.endswith("of them trained")]
    assert len(lines) == 1
    assert lines[0].startswith(f"entrenar {args.split()[0]}: ")
    assert words in lines[0]


# ---- the real thing


@pytest.mark.tier2
def test_real_model_prints_the_expected_text(shared_data: Path) -> None:
    model = shared_data / "models/stories260K.gguf"
    flags = ["--prompt", "", "--temperature", "0", "--max-new-tokens", "200"]
    command = [sys.executable, "-m", "entrenar.cli", "generate", "--model", str(model), *flags]
    printed = subprocess.run(command, capture_output=True, check=True).stdout
    assert printed == (shared_data / "models/stories260K_expected_greedy.txt").read_bytes()


# ---- adapters


@pytest.mark.tier2
def test_variants_train_and_adapters_are_converted(
    base: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", base, "--data", text_file, *TRAINING, "--rank", "2", "--loraplus-lr-ratio", "4"]
    words += ["--modules-to-save", "model.norm"]
    assert run(capsys, "finetune", *words, "--out", tmp_path / "dora", "--dora", "--rslora")[0] == 0
    raw = json.loads((tmp_path / "dora/adapter/adapter_config.json").read_text())
    assert (raw["use_dora"], raw["use_rslora"], raw["modules_to_save"]) == (True, True, ["model.norm"])
    convert = ["convert", "--model", base, "--adapter"]
    code, _, err = run(capsys, *convert, tmp_path / "dora/adapter", "--out", tmp_path / "dora.gguf")
    assert code == 1
    assert "merge" in err


@pytest.mark.tier2
def test_an_adapter_goes_to_llama_cpp_and_back(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert = ["convert", "--model", base, "--adapter"]
    assert run(capsys, *convert, adapter, "--out", tmp_path / "a.gguf")[0] == 0
    assert run(capsys, *convert, tmp_path / "a.gguf", "--out", tmp_path / "back")[0] == 0
    weights = "adapter_model.safetensors"
    assert (tmp_path / "back" / weights).read_bytes() == (adapter / weights).read_bytes()
    prompt = ["--prompt", "the cat", "--max-new-tokens", "16"]
    _, first, _ = run(capsys, "generate", "--model", base, "--adapter", adapter, *prompt)
    _, second, _ = run(capsys, "generate", "--model", base, "--adapter", tmp_path / "a.gguf", *prompt)
    assert first == second
