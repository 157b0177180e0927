"""The generation loop: stop strings, end tokens, streaming, and the errors of an impossible call."""

import pytest
import tiny_models as tiny
from hypothesis import given
from hypothesis import strategies as st

from entrenar import no_grad
from entrenar.errors import ConfigError, UsageError
from entrenar.generate.run import StopStrings

pytestmark = pytest.mark.tier1


@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_pass_just_what_comes_before_the_first(text, stops, data):
    """However the text is cut into pieces, and never a piece too early."""
    holder, out, at = StopStrings(tuple(stops)), "", 0
    while at < len(text) and not holder.found:
        size = data.draw(st.integers(1, 5))
        out += holder.push(text[at : at + size])
        at += size
        assert text.startswith(out)
    first = min((i for s in stops if (i := text[:at].find(s)) >= 0), default=None)
    assert holder.found == (first is not None)
    assert out + holder.finish() == (text if first is None else text[:first])


def test_ids_in_ids_out_without_a_tokenizer():
    model = tiny.model()
    out = model.generate([1, 2, 3], max_new_tokens=6)
    assert len(out.ids) == 6
    assert out.prompt_ids == [1, 2, 3]
    assert out.text == ""
    assert out.finish_reason == "length"
    assert model.generate([1, 2, 3], max_new_tokens=6).ids == out.ids


def test_an_end_token_ends():
    model = tiny.model()
    ids = model.generate([1, 2, 3], max_new_tokens=6).ids
    model.config = model.config.replace(eos_token_id=ids[2])
    out = model.generate([1, 2, 3], max_new_tokens=6)
    assert out.ids == ids[: ids.index(ids[2]) + 1]
    assert out.finish_reason == "stop"
    assert model.generate([1, 2, 3], max_new_tokens=10**15).ids == out.ids  # room is made as it is needed


def test_a_full_context_goes_on_from_its_last_half():
    model = tiny.model()
    context, read, expected = model.config.max_position_embeddings, [1, 2, 3], []
    for _ in range(2 * context):
        read = read if len(read) <= context else read[-(context // 2) :]
        with no_grad():
            expected.append(int(model([read]).numpy()[0, -1].argmax()))
        read = [*read, expected[-1]]
    assert model.generate([1, 2, 3], 2 * context).ids == expected


def test_a_prompt_beyond_the_context_is_refused():
    model = tiny.model()
    assert len(model.generate([1] * 64, 2).ids) == 2
    with pytest.raises(UsageError, match="the prompt has 65 tokens and the model's context holds 64"):
        model.generate([1] * 65, 2)


def test_sampling_depends_on_the_seed_alone():
    model = tiny.model()
    a, b, c = (model.generate([1], 20, temperature=1.5, seed=s).ids for s in (1, 1, 2))
    assert a == b != c


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"prompt": "words"}, UsageError),
        ({"prompt": []}, UsageError),
        ({"prompt": [1], "max_new_tokens": 0}, ConfigError),
        ({"prompt": [1], "stop": ""}, ConfigError),
        ({"prompt": [1], "stop": ["x"]}, UsageError),
        ({"prompt": [1], "top_p": 7.0}, ConfigError),
    ],
)
def test_an_impossible_call_is_refused_before_the_first_token(arguments, error):
    with pytest.raises(error):
        tiny.model().generate(**arguments)


def test_dropout_does_not_act_and_the_mode_comes_back():
    from entrenar import LoraConfig

    model = tiny.model(lora=LoraConfig(r=2, lora_dropout=0.6, target_modules="all-linear")).train()
    stream = model.generate([1, 2], 5, stream=True)
    assert stream.drain().ids == model.generate([1, 2], 5).ids
    assert model.training
