"""From records to labels: which tokens are learned, by format and chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from entrenar.data import IGNORE, Sample, read, render, show
from entrenar.data.records import Record, record
from entrenar.errors import DataError
from entrenar.tokenizer import Tokenizer, from_directory, train_bpe

pytestmark = pytest.mark.tier1

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
OPEN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
REWRITES = "{% for m in messages %}{{ m.role }}{{ '!' if loop.last }} {{ m.content }}\n{% endfor %}"
TEXTS = ["user assistant system What is two plus two? Four. <|im_start|> [INST] [/INST] " * 20]


def tokenizer(template: str | None = None) -> Tokenizer:
    made = train_bpe(TEXTS, 330)
    made.chat_template = template
    return made


def chat(*turns: str) -> Record:
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    return record("chat.jsonl:3", {"messages": messages})


def learned(sample: Sample, tok: Tokenizer) -> str:
    return tok.decode([int(i) for i in sample.labels if i != IGNORE], skip_special=False)


def text_of(sample: Sample, tok: Tokenizer) -> str:
    return tok.decode(sample.ids.tolist(), skip_special=False)


def test_text_learns_all_and_the_end() -> None:
    tok = tokenizer()
    sample = render(Record("x:1", "text", "Four."), tok)
    assert text_of(sample, tok) == "<s>Four.</s>"
    assert sample.labels.tolist() == sample.ids.tolist()


def test_bos_that_the_text_brings_is_not_doubled() -> None:
    tok = tokenizer()
    assert text_of(render(Record("x:1", "text", "<s>Four."), tok), tok) == "<s>Four.</s>"
    assert tok.encode("<s>Four.") == tok.encode("Four.")


@pytest.mark.parametrize("mask", [True, False])
def test_completion_learns_the_answer_and_the_end(mask: bool) -> None:
    tok = tokenizer()
    prompt, answer = "What is two plus two? ", "Four."
    sample = render(Record("x:1", "prompt/completion", answer, prompt), tok, mask_prompt=mask)
    asked = tok.encode(prompt)
    assert sample.ids[: len(asked)].tolist() == asked, "the prompt must be what generation will be given"
    assert learned(sample, tok) == ("" if mask else f"<s>{prompt}") + "Four.</s>"
    assert text_of(sample, tok) == f"<s>{prompt}{answer}</s>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "Four.<|im_end|>\nSix.<|im_end|>\n</s>"),
        (LLAMA2, " Four. </s> Six. </s>"),
        (THINKING, "Four.<|im_end|>\nSix.<|im_end|>\n</s>"),
        (OPEN, " Four.\nSix.\n</s>"),
        (None, "Four.</s>\nSix.</s>\n"),
    ],
    ids=["chatml", "llama2", "thinking", "no end of turn", "no template"],
)
def test_conversation_learns_what_the_assistant_says(template: str | None, expected: str) -> None:
    tok = tokenizer(template)
    sample = render(chat("What is two?", "Four.", "And plus two?", "Six."), tok)
    assert learned(sample, tok) == expected
    assert text_of(sample, tok).startswith("<s>")
    assert not text_of(sample, tok).startswith("<s><s>")
    everything = render(chat("What is two?", "Four.", "And plus two?", "Six."), tok, mask_prompt=False)
    assert everything.labels.tolist() == everything.ids.tolist() == sample.ids.tolist()
    assert (everything.labels[1:] != IGNORE).all()


def test_prompt_of_a_conversation_is_what_generation_is_given() -> None:
    for template in (CHATML, LLAMA2, None):
        tok = tokenizer(template)
        sample = render(chat("What is two?", "Four."), tok)
        asked = tok.encode_chat([{"role": "user", "content": "What is two?"}], add_generation_prompt=True)
        assert sample.ids[: len(asked)].tolist() == asked
        assert (sample.labels[: len(asked)] == IGNORE).all()
        assert sample.labels[len(asked)] != IGNORE


def test_template_that_rewrites_turns_is_refused() -> None:
    tok = tokenizer(REWRITES)
    with pytest.raises(DataError, match=r"chat.jsonl:3: the chat template rewrites earlier turns"):
        render(chat("a", "b", "c", "d"), tok)
    assert (render(chat("a", "b", "c", "d"), tok, mask_prompt=False).labels != IGNORE).all()


def test_template_that_refuses_names_the_line() -> None:
    line = {"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]}
    with pytest.raises(DataError, match=r"d:9: chat template .*only user and assistant"):
        render(record("d:9", line), tokenizer(LLAMA2))


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (Record("d:4", "text", ""), "nothing to learn: "),
        (Record("d:4", "prompt/completion", "", "What?"), "nothing to learn: "),
        (record("d:4", {"messages": [{"role": "user", "content": "hi"}]}), "nothing to learn: "),
        (
            Record("d:4", "prompt/completion", "Four.", "What is two plus two? " * 20),
            "nothing to learn in the first 16",
        ),
    ],
    ids=["empty text", "empty completion", "no assistant", "prompt too long"],
)
def test_nothing_to_learn_is_an_error_that_names_the_sample(made: Record, reason: str) -> None:
    with pytest.raises(DataError, match=f"^d:4: {reason}"):
        render(made, tokenizer(), seq_len=16)


def test_truncation() -> None:
    sample = render(Record("d:1", "text", "What is two plus two? " * 9), tokenizer(), seq_len=7)
    assert sample.truncated
    assert len(sample.ids) == len(sample.labels) == 7


def test_show_marks_what_is_learned() -> None:
    tok = tokenizer()
    sample = render(Record("x:1", "prompt/completion", "[b]é日", "What?"), tok)
    assert show(sample, tok) == "<s>What?⟦[b]é日</s>⟧"
    assert show(sample, tok, markup=True) == "[dim]<s>What?[/][green]\\[b]é日</s>[/]"


def test_sentencepiece_completion_has_no_space_of_its_own(tmp_path: Path, spm_directory: Path) -> None:
    """Llama 2's tokenizer puts a space before a text; a completion goes on from its prompt without one."""
    tok = from_directory(spm_directory)
    assert tok is not None
    line = {"prompt": "ab ", "completion": "ab a"}
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(line))
    sample = render(read(path).records[0], tok)
    assert [tok.token(int(i)) for i in sample.ids] == ["<s>", "\u2581ab", "\u2581", "ab", "\u2581a", "</s>"]
    assert tok.decode(sample.ids.tolist()) == "ab ab a"
