"""The public surface: every name that other programs rely on is there, documented, typed and lazy."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import entrenar as en

NAMES = (
    "Tensor", "no_grad", "checkpoint", "manual_seed", "set_num_threads", "get_num_threads",
    "LoraConfig", "ModelConfig", "CausalLM", "load", "count_parameters", "Trainer", "TrainConfig",
    "errors", "ops", "nn", "optim", "quant", "formats", "tokenizer", "data", "models", "train",
    "generate", "observe",
)  # fmt: skip
OPS = (
    "add", "sub", "mul", "div", "neg", "pow", "exp", "log", "matmul", "sum", "mean", "reshape",
    "transpose", "concat", "relu", "gelu", "silu", "swiglu", "softmax", "layer_norm", "rms_norm",
    "rope", "attention", "embedding", "dropout", "cross_entropy", "linear",
)  # fmt: skip
MODEL = (
    "from_config", "loss", "parameters", "named_parameters", "add_lora", "save_adapter", "load_adapter",
    "merge_adapter", "save", "generate", "train", "eval", "config", "tokenizer",
)  # fmt: skip
LAZY = ("numpy", "tokenizers", "rich", "jinja2", "tyro", "safetensors", "ml_dtypes")


@pytest.mark.tier1
@pytest.mark.parametrize("name", NAMES)
def test_public_name(name: str) -> None:
    assert name in en.__all__
    assert name in dir(en)
    assert inspect.getdoc(getattr(en, name))


@pytest.mark.tier1
def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Tensro'"):
        en.Tensro  # noqa: B018


@pytest.mark.tier1
@pytest.mark.parametrize("name", OPS)
def test_op(name: str) -> None:
    assert callable(getattr(en.ops, name))


@pytest.mark.tier1
def test_optimizers_and_schedules() -> None:
    for name in ("SGD", "Adam", "AdamW"):
        for method in ("step", "zero_grad", "state_dict", "load_state_dict"):
            assert callable(getattr(getattr(en.optim, name), method))
    for name in ("constant", "linear", "cosine", "step", "exponential"):
        assert callable(getattr(en.optim.schedule, name))
    assert callable(en.optim.clip_grad_norm)


@pytest.mark.tier1
def test_model_methods() -> None:
    model = en.CausalLM.from_config(
        en.ModelConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    )
    assert [name for name in MODEL if not hasattr(model, name)] == []
    assert model([[1, 2, 3]]).shape == (1, 3, 32)


@pytest.mark.tier1
def test_every_train_setting_says_what_it_is() -> None:
    assert [f.name for f in fields(en.TrainConfig) if not f.metadata.get("help")] == []


@pytest.mark.tier1
def test_every_error_is_an_entrenar_error() -> None:
    classes = [c for _, c in inspect.getmembers(en.errors, inspect.isclass) if issubclass(c, Exception)]
    assert len(classes) >= 10
    assert all(issubclass(c, en.errors.EntrenarError) for c in classes)


@pytest.mark.tier1
def test_the_package_is_typed() -> None:
    assert (Path(en.__file__).parent / "py.typed").is_file()


@pytest.mark.tier1
def test_import_loads_nothing_heavy() -> None:
    program = f"import sys, entrenar, entrenar.cli; print([m for m in {LAZY} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


@pytest.mark.tier1
def test_program_is_installed() -> None:
    (entry,) = [e for e in entry_points(group="console_scripts") if e.name == "entrenar"]
    assert entry.load().__module__ == "entrenar.cli"
