"""The learning rate that a run gets where none is given."""

import pytest
import tiny

import entrenar as en
from entrenar.train.setup import make_schedule, resolved

pytestmark = pytest.mark.tier1


def test_the_default_rate_falls_with_the_width_and_is_ten_times_higher_for_an_adapter():
    adapter, whole = tiny.model(lora=True), tiny.model(lora=False)
    rate = resolved(en.TrainConfig(), adapter.config, adapter.adapter).learning_rate
    assert rate == pytest.approx(5e-4 * 125**0.781)  # 16 wide
    assert resolved(en.TrainConfig(), whole.config, None).learning_rate == pytest.approx(rate / 10)
    wide = whole.config.replace(hidden_size=4096, head_dim=None)
    assert 1e-5 < resolved(en.TrainConfig(), wide, None).learning_rate < 1e-4


@pytest.mark.parametrize(
    ("ratio", "settings", "divisor"),
    [
        (None, {"r": 64}, 1),
        (16, {"r": 64}, 16),  # B keeps the ordinary rate
        (0.5, {"r": 64}, 1),  # and A, where A is the faster one
        (None, {"r": 64, "use_rslora": True}, 8),  # alpha/√64 is 8 times alpha/64
        (None, {"r": 64, "use_rslora": True, "use_dora": True, "lora_alpha": 3}, 8),
        (16, {"r": 4, "use_rslora": True}, 32),
    ],
)
def test_the_default_rate_is_lower_by_what_makes_an_adapter_faster(
    ratio: float | None, settings: dict[str, object], divisor: float
) -> None:
    config = tiny.model(lora=False).config
    found = resolved(en.TrainConfig(loraplus_lr_ratio=ratio), config, en.LoraConfig(**settings))
    assert found.learning_rate == pytest.approx(5e-4 * 125**0.781 / divisor)
    full = resolved(en.TrainConfig(loraplus_lr_ratio=ratio), config, None)
    assert full.learning_rate == pytest.approx(5e-5 * 125**0.781)


def test_a_rate_that_is_given_stays():
    config = en.TrainConfig(learning_rate=0.5, loraplus_lr_ratio=16)
    model = tiny.model(lora=True)
    assert resolved(config, model.config, model.adapter).learning_rate == 0.5


def test_the_rate_used_is_in_the_record(tmp_path):
    trainer = en.Trainer(tiny.model(), tiny.data(), tiny.config(tmp_path, learning_rate=None))
    assert trainer.config.learning_rate == pytest.approx(5e-4 * 125**0.781)
    assert trainer.identity["config"]["learning_rate"] == trainer.config.learning_rate


def test_a_share_of_warm_up_steps_is_rounded_up_and_a_number_of_them_comes_first():
    for settings, steps in (({"warmup_ratio": 0.25}, 3), ({"warmup_ratio": 0.25, "warmup_steps": 5}, 5)):
        rate = make_schedule(en.TrainConfig(learning_rate=1.0, lr_scheduler="constant", **settings), 10)
        assert [rate(step) for step in range(steps + 1)] == pytest.approx([s / steps for s in range(steps + 1)])
