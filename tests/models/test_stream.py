"""Layers whose quantized weights stay in the file: the same bits, two layers in memory at a time."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import entrenar
from entrenar import LoraConfig, ModelConfig
from entrenar.errors import ConfigError, UsageError
from entrenar.models.arch.base import SAME, permute_heads
from entrenar.models.stream import LayerStream, StreamedQTensor, resident
from entrenar.quant import QTYPES, quantize
from entrenar.train.config import TrainConfig
from entrenar.train.footprint import Work

IDS = np.random.default_rng(0).integers(3, 90, (2, 40))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    config = ModelConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=5,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    path = tmp_path_factory.mktemp("stream") / "m.gguf"
    entrenar.CausalLM.from_config(config, seed=3, dtype="f32").save(path, quant="q5_1")
    return path


def gradients(model, recompute):
    model.add_lora(LoraConfig(r=4, target_modules="all-linear"), seed=1).train()
    for i, (name, weight) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            weight.data[...] = 0.1 * np.random.default_rng(i).standard_normal(weight.shape)
    model.model.recompute = recompute
    losses = []
    for _ in range(2):  # the second pass begins where the first ended
        loss = model.loss(IDS)
        loss.backward()
        losses.append(loss.item())
    return losses, {name: weight.grad.data for name, weight in model.named_parameters()}


@pytest.mark.parametrize("recompute", [0, 2, 5])
def test_losses_and_gradients_have_the_bits_of_the_model_in_memory(path, recompute):
    (losses, grads), (streamed, others) = (
        gradients(entrenar.load(path, stream=stream), recompute) for stream in (False, True)
    )
    assert losses == streamed
    for name, grad in grads.items():
        np.testing.assert_array_equal(grad, others[name])


@pytest.mark.tier1
def test_what_is_in_memory_and_what_is_saved(path, tmp_path):
    plain, model = entrenar.load(path), entrenar.load(path, stream=True)
    streamed = {name for name, weight in model.named_weights() if isinstance(weight, StreamedQTensor)}
    assert len(streamed) == 5 * 7
    for (name, weight), (_, other) in zip(model.named_weights(), plain.named_weights(), strict=True):
        assert len(weight.source_bytes()) == len(other.source_bytes()), name
        assert weight.source_bytes().tobytes() == other.source_bytes().tobytes(), name
    (tmp_path / "other").mkdir()
    saved = [tmp_path / "m.gguf", tmp_path / "other/m.gguf"]
    for each, to in zip((plain, model), saved, strict=True):
        each.save(to)
    assert saved[0].read_bytes() == saved[1].read_bytes()
    assert model.generate([5, 6], max_new_tokens=8, temperature=0).ids == plain.generate(
        [5, 6], max_new_tokens=8, temperature=0).ids  # fmt: skip
    work = Work.of(model.add_lora(LoraConfig(r=4)), TrainConfig())
    sizes = {name: len(weight.source_bytes()) for name, weight in plain.named_weights()}
    inside = sum(size for name, size in sizes.items() if name not in streamed)
    layer = sum(size for name, size in sizes.items() if name in streamed and name.startswith("model.layers.0."))
    assert inside < sum(work.resident.values()) < inside + 2 * (layer + 7 * 64) + 1


def test_a_copy_reads_the_same_file_and_a_pickle_is_refused(path):
    model = entrenar.load(path, stream=True)
    np.testing.assert_array_equal(copy.deepcopy(model).loss(IDS).data, model.loss(IDS).data)
    with pytest.raises(UsageError, match="stays in its file"):
        pickle.dumps(model)


def stream_of(layers, read=None):
    """Layers of two tensors each, one with rows in another order; and what they hold."""
    rng = np.random.default_rng(1)
    names = [f"{i}.{j}" for i in range(layers) for j in (0, 1)]
    held = {name: quantize(rng.standard_normal((8, 64)).astype(np.float32), "q8_0") for name in names}
    reads = []

    def copy(name, out):
        reads.append(name)
        out[...] = held[name].bytes

    stream, order = LayerStream(read or copy), permute_heads(2)
    kind, shape = QTYPES["q8_0"], (8, 64)
    weights = [
        [stream.weight(i, f"{i}.{j}", kind, shape, 8 * 68, (SAME, order)[j]) for j in (0, 1)] for i in range(layers)
    ]
    turned = {name: order.from_gguf(q.bytes.reshape(8, -1)).reshape(-1) if name.endswith(".1") else q.bytes
              for name, q in held.items()}  # fmt: skip
    return stream, weights, turned, reads


@pytest.mark.tier1
def test_any_order_gives_the_right_bytes_and_going_up_or_down_reads_each_layer_once():
    stream, weights, held, reads = stream_of(6)
    rng = np.random.default_rng(2)
    for layer in [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0]:
        for j in (0, 1):
            np.testing.assert_array_equal(weights[layer][j].bytes, held[f"{layer}.{j}"])
    stream._of_thread.rooms._wait()
    assert len(reads) == 2 * (6 + 4)  # down again, the two last ones are still there
    for layer in rng.integers(6, size=60):
        j = int(rng.integers(2))
        np.testing.assert_array_equal(weights[layer][j].dense(), weights[layer][j].dense())
        np.testing.assert_array_equal(weights[layer][j].bytes, held[f"{layer}.{j}"])
    assert stream.room_bytes == 2 * 8 * 68 + -8 * 68 % 64


@pytest.mark.tier1
def test_an_error_of_reading_ahead_reaches_who_waits():
    def read(name, out):
        if name.startswith("2."):
            raise OSError(5, "broken")
        out.fill(0)

    _, weights, _, _ = stream_of(4, read)
    assert not weights[0][0].bytes.any()
    assert not weights[1][0].bytes.any()
    with pytest.raises(OSError, match="broken"):
        _ = weights[2][0].bytes
    assert not weights[3][0].bytes.any()


@pytest.mark.tier1
def test_threads_that_share_a_model_do_not_disturb_each_other():
    _, weights, held, _ = stream_of(6)
    start = threading.Barrier(3)

    def use(layers):
        start.wait()
        wrong = 0
        for layer in layers:
            some = weights[layer][0].bytes
            time.sleep(0)  # let the others run
            wrong += not np.array_equal(some, held[f"{layer}.0"])
        return wrong

    orders = [range(6), range(5, -1, -1), (0, 4, 2, 5, 1, 3)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(use, [[*order] * 30 for order in orders])) == [0, 0, 0]


@pytest.mark.tier1
def test_an_interrupted_wait_forgets_no_reading():
    """Ctrl-C while layer 2 is being read ahead: it must not end up in the room that layer 0 is given next."""
    go = threading.Event()

    def read(name, out):
        if name == "2.0" and threading.current_thread() is not threading.main_thread():
            go.wait(20)  # a slow disk
        out.fill(int(name[0]))

    def interrupt(*_):
        raise KeyboardInterrupt

    _, weights, _, _ = stream_of(4, read)
    assert set(weights[0][0].bytes) == {0}
    assert set(weights[1][0].bytes) == {1}
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            _ = weights[2][0].bytes
    finally:
        signal.signal(signal.SIGALRM, before)
    threading.Timer(0.05, go.set).start()
    first = weights[0][0].bytes
    go.wait(20)
    time.sleep(0.05)  # who still reads would be done
    assert set(first) == {0}
    for layer in (0, 3, 2, 1):
        assert set(weights[layer][0].bytes) == {layer}
        assert set(weights[layer][1].bytes) == {layer}


@pytest.mark.tier1
def test_a_forked_process_reads_for_itself():
    _, weights, held, _ = stream_of(4)
    assert np.array_equal(weights[1][0].bytes, held["1.0"])
    child = os.fork()
    if child == 0:  # no thread but this one has come along
        signal.alarm(20)
        right = all(np.array_equal(weights[layer][0].bytes, held[f"{layer}.0"]) for layer in (1, 2, 3, 0))
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(weights[3][0].bytes, held["3.0"])


@pytest.mark.tier1
@pytest.mark.parametrize(
    ("name", "how", "why"),
    [
        ("plain.gguf", {}, "no layer has quantized weights"),
        ("plain.gguf", {"quant": "q8_0"}, "no layer has quantized weights"),
        ("m.gguf", {"dtype": "f16"}, "another dtype expands the quantized weights"),
        ("dir", {}, "is no GGUF file; `entrenar quantize` makes one"),
    ],
)
def test_what_can_not_be_streamed_is_said(path, tmp_path, name, how, why):
    (tmp_path / "m.gguf").write_bytes(path.read_bytes())
    for other in ("plain.gguf", "dir"):
        entrenar.load(path, dtype="f32").save(tmp_path / other)
    with pytest.raises(ConfigError, match=why):
        entrenar.load(tmp_path / name, stream=True, **how)


@pytest.mark.tier1
def test_without_streams_all_is_resident():
    assert resident({"a": 5}, {}) == {"a": 5}
