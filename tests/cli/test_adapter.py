"""The settings of an adapter: the names that other programs have for them, and what impossible ones say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from entrenar.cli import bench, finetune, plan
from entrenar.cli.adapter import AXOLOTL, PEFT, AdapterSettings
from entrenar.cli.settings import parse, to_toml
from entrenar.errors import ConfigError, UsageError
from entrenar.nn.lora import LoraConfig

pytestmark = pytest.mark.tier1

NEEDED = ["--model", "m", "--data", "d", "--out", "o"]
# another program's key, its value, our setting, and what that is then
SPELLINGS = [
    ("r", 8, "rank", 8),
    ("lora_r", 8, "rank", 8),
    ("lora_alpha", 5.5, "alpha", 5.5),
    ("lora_dropout", 0.25, "dropout", 0.25),
    ("target_modules", ["q_proj", "v_proj"], "target", ("q_proj", "v_proj")),
    ("lora_target_modules", "all-linear", "target", ("all-linear",)),
    ("lora_target_linear", True, "target", ("all-linear",)),
    ("lora_modules_to_save", ["lm_head", "norm"], "modules_to_save", ("lm_head", "norm")),
    ("use_dora", True, "dora", True),
    ("peft_use_dora", True, "dora", True),
    ("use_rslora", True, "rslora", True),
    ("peft_use_rslora", True, "rslora", True),
    ("load_in_4bit", True, "quant", "nf4"),
    ("load_in_4bit", False, "quant", None),
    ("load_in_8bit", True, "quant", "q8_0"),
    ("load_in_8bit", False, "quant", None),
    ("adapter", "qlora", "quant", "nf4"),
    ("adapter", "lora", "quant", None),
    ("optim", "adamw_bnb_8bit", "optimizer", "adamw_8bit"),
    ("optimizer", "adamw_torch", "optimizer", "adamw"),
    ("micro_batch_size", 3, "batch_size", 3),
]


def settings(*args: str) -> finetune.Command:
    found = parse(finetune.Command, [*NEEDED, *args], "entrenar finetune")
    assert found is not None
    return found


def toml(key: str, value: object) -> str:
    return f"{key} = {json.dumps(value)}\n"  # JSON's numbers, strings, booleans and lists are TOML's too


def as_json(key: str, value: object) -> str:
    return json.dumps({key: value})


@pytest.mark.parametrize(("key", "value", "name", "expected"), SPELLINGS)
def test_other_programs_names_in_files_and_as_flags(
    key: str, value: object, name: str, expected: object, tmp_path: Path
) -> None:
    flag = "--" + key.replace("_", "-")
    if isinstance(value, bool):
        words = [flag if value else f"{flag}=false"]
    else:
        words = [flag, *map(str, value if isinstance(value, list) else [value])]
    assert getattr(settings(*words), name) == expected
    for suffix, write in ((".toml", toml), (".json", as_json)):
        file = tmp_path / f"run{suffix}"
        file.write_text(write(key, value))
        found = settings("--config", str(file))
        assert getattr(found, name) == expected
        (tmp_path / "again.toml").write_text(to_toml(found))  # as a run's directory keeps it
        assert parse(finetune.Command, ["--config", str(tmp_path / "again.toml")], "entrenar finetune") == found


def test_each_name_is_another_s_of_one_that_exists() -> None:
    names = set(AdapterSettings.__dataclass_fields__)
    assert set((PEFT | AXOLOTL).values()) <= names
    assert not names & set(PEFT | AXOLOTL)
    assert set(PEFT) <= set(LoraConfig.__dataclass_fields__)
    told = {key for key, *_ in SPELLINGS}
    assert set(AdapterSettings.ALIASES) | set(AdapterSettings.MEANINGS) <= told


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--target q_proj,v_proj", "target: 'q_proj,v_proj' is one word and no list of names: --target q_proj v_proj;"),
        ("--rank 0", "rank: 0 is not a rank from 1 to 512"),
        ("--r 0", "rank: 0 is not a rank from 1 to 512"),
        ("--alpha 0", "alpha: 0.0 is not a positive number"),
        ("--dropout 1", "dropout: 1.0 is not in [0, 1)"),
        ("--adapter llama", "adapter: 'llama' is not one of lora, qlora"),
        ("--load-in-4bit=perhaps", "load_in_4bit: 'perhaps' is not one of true, false"),
        ("--load-in-4bit --quant q4_0", "load_in_4bit true means quant nf4, and quant says q4_0; give one of the two"),
        ("--load-in-4bit --load-in-8bit", "load_in_8bit true means quant q8_0, and load_in_4bit says nf4"),
        ("--adapter qlora --load-in-8bit", "load_in_8bit true means quant q8_0, and adapter says nf4"),
        ("--lora-target-linear --target q_proj", "lora_target_linear true means target all-linear, and target says"),
        ("--no-lora-target-linear", "lora_target_linear false: which layers get an adapter is said by target"),
        ("--lora-rank 8", "unknown flag --lora-rank; did you mean --"),
    ],
)  # fmt: skip
def test_what_can_not_be(flags: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        settings(*flags.split())
    assert complaint in str(caught.value)


def test_a_flag_comes_before_a_file_whatever_both_are_called(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("lora_r = 8\nload_in_4bit = true\n")
    found = settings("--config", str(file), "--rank", "4", "--quant", "q4_0")
    assert (found.rank, found.quant) == (4, "q4_0")
    file.write_text("lora_r = 8\nrank = 4\n")
    with pytest.raises(ConfigError, match="key rank is given twice"):
        settings("--config", str(file))


@pytest.mark.parametrize(
    ("text", "flags", "quant"),
    [
        ("load_in_4bit = true", "", "nf4"),
        ("load_in_4bit = true", "--no-load-in-4bit", None),
        ("load_in_4bit = true", "--load-in-8bit", "q8_0"),
        ('adapter = "qlora"', "--adapter lora", None),
        ('quant = "q4_0"', "--no-load-in-4bit", None),
        ("load_in_4bit = false\nload_in_8bit = true", "", "q8_0"),
        ("load_in_8bit = true\nload_in_4bit = false", "", "q8_0"),
        ("load_in_4bit = false", "--adapter qlora", "nf4"),
    ],
)
def test_what_was_said_is_taken_back(text: str, flags: str, quant: str | None, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(text)
    assert settings("--config", str(tmp_path / "run.toml"), *flags.split()).quant == quant


def test_several_names_in_one_word_of_a_file_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('target_modules = "q_proj v_proj"')
    with pytest.raises(UsageError, match=r"'q_proj v_proj' is one word and no list of names.*in a file a list"):
        settings("--config", str(tmp_path / "run.toml"))
    (tmp_path / "run.toml").write_text('lora_target_linear = false\ntarget_modules = ["q_proj", "v_proj"]')
    assert settings("--config", str(tmp_path / "run.toml")).target == ("q_proj", "v_proj")


def test_a_key_is_once_in_a_json_file_and_the_suffix_may_be_large(tmp_path: Path) -> None:
    (tmp_path / "run.JSON").write_text('{"r": 8, "lora": {"r": 16}}')
    with pytest.raises(ConfigError, match="key r is given twice"):
        settings("--config", str(tmp_path / "run.JSON"))
    (tmp_path / "run.JSON").write_text('{"r": 8, "r": 16}')
    with pytest.raises(ConfigError, match="key 'r' is there twice"):
        settings("--config", str(tmp_path / "run.JSON"))
    (tmp_path / "run.JSON").write_text('{"r": 8}')
    assert settings("--config", str(tmp_path / "run.JSON")).rank == 8


@pytest.mark.parametrize(
    ("command", "needed"),
    [
        (finetune.Command, NEEDED),
        (plan.Command, ["--preset", "llama-124m"]),
        (bench.Command, ["step", "--preset", "llama-124m"]),
    ],
)
def test_the_commands_share_them(command: type, needed: list[str]) -> None:
    flags = "--r 8 --lora-alpha 4 --use-dora --use-rslora --lora-dropout 0.1 --modules-to-save lm_head"
    found = parse(command, [*needed, *flags.split(), "--target-modules", "q_proj"], "entrenar")
    assert found is not None
    assert found.lora_config() == LoraConfig(
        r=8, lora_alpha=4, use_dora=True, use_rslora=True, lora_dropout=0.1, target_modules=["q_proj"],
        modules_to_save=["lm_head"],
    )  # fmt: skip
