"""A Hugging Face directory's tokenizer: tokenizer.json as it is, with what the files beside it add."""

from __future__ import annotations

import json
import os
from os import PathLike
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Engine

from entrenar.errors import TokenizerError
from entrenar.tokenizer.pieces import flatten
from entrenar.tokenizer.tokenizer import Tokenizer


def from_directory(directory: str | PathLike[str]) -> Tokenizer | None:
    """The tokenizer in `directory`, None where there is none.

    Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja and the
    end-of-text ids of generation_config.json. Raises TokenizerError that names the file at fault.
    """
    root = Path(directory)
    path = root / "tokenizer.json"
    if not path.is_file():
        if (root / "tokenizer.model").is_file():
            raise TokenizerError(
                f"{root / 'tokenizer.model'}: only tokenizer.json is read; "
                "save the tokenizer once with transformers' AutoTokenizer to get it"
            )
        return None
    engine = _engine(path)
    config = {**_object(root / "special_tokens_map.json"), **_object(root / "tokenizer_config.json")}
    bos, eos, pad, unk = (
        _special(root, engine, config, n) for n in ("bos_token", "eos_token", "pad_token", "unk_token")
    )
    frame = engine.encode("").ids
    ends = _object(root / "generation_config.json").get("eos_token_id")
    ends = [i for i in (ends if isinstance(ends, list) else [ends]) if isinstance(i, int)]
    return Tokenizer(
        engine,
        bos_id=bos,
        eos_ids=[i for i in (eos, *ends) if i is not None],
        pad_id=pad,
        unk_id=unk,
        add_bos=_flag(root, config, "add_bos_token", bos is not None and frame[:1] == [bos]),
        add_eos=_flag(
            root,
            config,
            "add_eos_token",
            eos is not None and frame[-1:] == [eos] and len(frame) > (bos == eos),
        ),
        chat_template=_chat_template(root, config),
        config=config,
    )


def save(tokenizer: Tokenizer, directory: str | PathLike[str]) -> None:
    """Write tokenizer.json and tokenizer_config.json into `directory`, each at once or not at all."""
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    ids = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_id,
        "pad_token": tokenizer.pad_id,
        "unk_token": tokenizer.unk_id,
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **tokenizer.config,
        **{name: None if i is None else tokenizer.token(i) for name, i in ids.items()},
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": tokenizer.add_eos,
        **({} if tokenizer.chat_template is None else {"chat_template": tokenizer.chat_template}),
    }
    _write(root / "tokenizer.json", tokenizer.engine.to_str(pretty=True))
    _write(root / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _engine(path: Path) -> Engine:
    _check(path, _object(path))
    try:
        engine = Engine.from_str(path.read_text(encoding="utf-8"))
    except Exception as e:  # the engine raises bare Exception, and nothing else, for a description it can't read
        if type(e) is not Exception:
            raise
        raise TokenizerError(f"{path}: {e}") from None
    engine.no_truncation()
    engine.no_padding()
    return engine


def _check(path: Path, description: dict[str, Any]) -> None:
    """Refuse what the engine would panic on rather than report."""
    model = description.get("model")
    if isinstance(model, dict) and model.get("continuing_subword_prefix"):
        raise TokenizerError(f"{path}: model: continuing_subword_prefix is not served")
    for step in flatten(description.get("post_processor")):
        if step.get("type") == "TemplateProcessing":
            known = step.get("special_tokens")
            parts = [part for form in ("single", "pair") if isinstance(step.get(form), list) for part in step[form]]
            used = [part["SpecialToken"] for part in parts if isinstance(part, dict) and "SpecialToken" in part]
            names = [str(token.get("id")) for token in used if isinstance(token, dict)]
            lost = [name for name in names if not isinstance(known, dict) or name not in known]
            if lost:
                raise TokenizerError(f"{path}: post_processor: special_tokens lacks {lost[0]!r}")


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise TokenizerError(f"{path}: no JSON: {e}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: must be a JSON object, is {type(value).__name__}")
    return value


def _special(root: Path, engine: Engine, config: dict[str, Any], name: str) -> int | None:
    """Id of the special token that the configuration calls `name`."""
    value = config.get(name)
    token = value.get("content") if isinstance(value, dict) else value
    if token is None:
        return None
    found = engine.token_to_id(token) if isinstance(token, str) else None
    if found is None:
        raise TokenizerError(f"{root / 'tokenizer_config.json'}: {name} is {token!r}, which tokenizer.json lacks")
    return found


def _flag(root: Path, config: dict[str, Any], name: str, default: bool) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise TokenizerError(f"{root / 'tokenizer_config.json'}: {name} must be true or false, is {value!r}")
    return default if value is None else value


def _chat_template(root: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else the configuration's: one text, or several by name, then "default"."""
    path = root / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {t["name"]: t.get("template") for t in value if isinstance(t, dict) and "name" in t}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise TokenizerError(f"{root / 'tokenizer_config.json'}: chat_template must be text, is {type(value).__name__}")
    return value
