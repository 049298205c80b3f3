"""The probe detects other weights and other functions on every layout, and tolerates rounding."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from dist_llm.checkpoint.probe import Probe, build_probe_batch, compare_probes, parse_probe, select_logits
from dist_llm.config.schema import Config
from dist_llm.convert.layerwise_probe import compute_probe_layerwise
from dist_llm.convert.weights import DictWeights
from dist_llm.engines.measure_probe import measure_probe
from dist_llm.engines.native import NativeEngine
from dist_llm.errors import CheckpointError
from dist_llm.training.step import train_step
from tests.laws.law import SEQ_LEN, make_batches, make_config
from tests.laws.layouts import ADAMW, BART, BERT, MODELS, T5, Layout
from tests.laws.worlds import get_world

CPU = torch.device("cpu")


@torch.no_grad()
def build_engine(config: Config) -> NativeEngine:
    """Build an engine with matrices as large as trained ones, so that every module affects the loss."""
    engine = NativeEngine(config, CPU)
    for name, parameter in engine.named_parameters():
        if parameter.ndim > 1:
            parameter.mul_(20 if "embed" in name else 8)
    return engine


def measure_twice(config: Config) -> Probe:
    """Measure the probe before the first step, as a resume does, and check that a step with rate 0 keeps it."""
    engine = build_engine(config)
    before = measure_probe(engine, config)
    if config.data.seq_len == SEQ_LEN:
        train_step(engine, make_batches(config, engine, step=0), lr=0.0, step=0)
        assert compare_probes(before, measure_probe(engine, config), "a step with a rate of 0")
    return before


def measure_streamed(engine: NativeEngine, dtype: str = "fp32", **changes: Any) -> Probe:
    """Compute the probe layer by layer from the weights of the engine; `changes` are keys of the model config."""
    weights = DictWeights(engine.state.weights())
    return compute_probe_layerwise(weights, engine.config.model.model_copy(update=changes), dtype)


@pytest.mark.parametrize("model", MODELS)
def test_the_layerwise_probe_equals_that_of_the_engine(model: str) -> None:
    config = make_config(ranks=1, model=MODELS[model], optim=ADAMW, loss={"label_smoothing": 0.1, "z_loss": 1e-2})
    engine = build_engine(config)
    actual, expected = measure_probe(engine, config), measure_streamed(engine)
    assert actual.loss == pytest.approx(expected.loss, rel=1e-6)
    assert actual.logits == pytest.approx(expected.logits, rel=1e-5, abs=1e-6)
    assert compare_probes(expected, actual, "x").startswith("the probe's loss was")
    loss = torch.log_softmax(torch.tensor(actual.logits), 0)
    assert torch.isfinite(loss).all()
    assert engine.model_parts[0].head.loss.z_loss == 1e-2, "training continues without the configured loss"


LAYOUTS = [
    Layout(ranks=2, parallel={"dp_shard": 2}, model="tied"),
    Layout(ranks=2, parallel={"tp": 2}, model="gpt"),
    Layout(ranks=2, parallel={"cp": 2}, model="tied"),
    Layout(ranks=2, parallel={"pp": 2, "pp_schedule": "zbv"}, model="tied", micro_batch=6),
    Layout(ranks=2, parallel={"tp": 2}, model="t5"),
    Layout(ranks=2, parallel={"pp": 2}, model="encoder_decoder", micro_batch=6),
    Layout(ranks=2, parallel={"cp": 2}, model="bert"),
    Layout(ranks=3, parallel={"cp": 3}, model="bert"),
    Layout(ranks=3, parallel={"cp": 3}, model="gpt"),
    Layout(ranks=4, parallel={"pp": 2, "dp_shard": 2}, model="tied", micro_batch=3),
    Layout(ranks=4, parallel={"cp": 2, "tp": 2}, model="tied"),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_measures_the_same_probe(layout: Layout) -> None:
    """Three context ranks pad the sequences of the probe to 42 tokens, beyond the last position of the model."""
    model, data = MODELS[layout.model], {}
    if layout.ranks == 3:
        model, data = model | {"max_seq_len": 40}, {"seq_len": 36}
    sections = {"optim": ADAMW, "data": data}
    expected = measure_twice(make_config(ranks=1, model=model, **sections))
    sections["data"] = data | {"micro_batch": layout.micro_batch}
    config = make_config(ranks=layout.ranks, model=model, parallel=layout.parallel, **sections)
    for actual in get_world(layout.ranks).run(measure_twice, config):
        assert actual.loss == pytest.approx(expected.loss, rel=2e-5)
        assert (actual.logits is None) == ("dp_shard" not in layout.parallel or "pp" in layout.parallel)
        compare_probes(expected, actual, "x")


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ({}, {"rope_theta": 5e5}),
        ({}, {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8}),
        ({}, {"norm_order": "post"}),
        ({}, {"positions": "none"}),
        ({}, {"norm_eps": 1e-3}),
        ({}, {"logit_cap": 2.0}),
        (BERT, {"activation": "relu"}),
        (T5, {"attention_scale": 0.35}),
        (BART, {"norm_eps": 1e-3}),
    ],
    ids=str,
)
def test_a_model_of_another_function_is_refused(model: dict[str, Any], changes: dict[str, Any]) -> None:
    engine = build_engine(make_config(ranks=1, model=model, optim=ADAMW))
    with pytest.raises(CheckpointError, match=r"(?s)x: the weights do not compute.*loss was [\d.]+ and is [\d.]+"):
        compare_probes(measure_streamed(engine), measure_streamed(engine, **changes), "x")


def test_one_changed_parameter_is_refused() -> None:
    """Every parameter affects the probe: doubling one gives another loss."""
    engine = build_engine(make_config(ranks=1, model={"n_layers": 2, "tie_embeddings": False}))
    weights, config = engine.state.weights(), engine.config.model
    expected = measure_streamed(engine)
    for name, tensor in weights.items():
        changed = DictWeights(weights | {name: tensor * 2})
        with pytest.raises(CheckpointError, match="the weights do not compute"):
            compare_probes(expected, compute_probe_layerwise(changed, config), name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_rounding_errors_are_tolerated(precision: str) -> None:
    engine = build_engine(make_config(ranks=1))
    expected = measure_streamed(engine)
    rounded = measure_streamed(engine, precision)
    assert rounded.loss != expected.loss
    compare_probes(expected, rounded, "x")
    if precision == "bf16":
        with pytest.raises(CheckpointError):
            compare_probes(expected, replace(rounded, weights="fp32"), "the same difference is no rounding of fp32")
    half_engine = NativeEngine(make_config(ranks=1, precision=precision), CPU)
    for (_, low_precision), (_, full_precision) in zip(
        half_engine.named_parameters(), engine.named_parameters(), strict=True
    ):
        low_precision.data.copy_(full_precision)
    actual = measure_probe(half_engine, half_engine.config)
    assert actual.precision == precision
    compare_probes(expected, actual, "x")


def test_a_probe_file_is_parsed_back_unchanged() -> None:
    for probe in (Probe(1.5, (1.0, 2.0), "bf16", "fp16"), Probe(2.0)):
        assert parse_probe(probe.dump(), "x") == probe
    nan_probe = parse_probe(Probe(math.nan, (math.inf,)).dump(), "x")
    assert nan_probe is not None and math.isnan(nan_probe.loss)  # noqa: PT018
    compare_probes(nan_probe, Probe(1.0, (1.0,)), "nothing is known of such weights")
    with pytest.raises(CheckpointError):
        compare_probes(Probe(1.0), Probe(math.nan), "x")
    assert parse_probe(json.dumps({"format": "dist_llm probe 9"}).encode(), "x") is None
    for invalid_content in (
        b"",
        b"[]",
        b"{}",
        Probe(1.0).dump().replace(b"fp32", b"fp1"),
        Probe(1.0).dump().replace(b"1.0", b'"a"'),
    ):
        with pytest.raises(CheckpointError, match="x: is not a probe"):
            parse_probe(invalid_content, "x")


def test_the_probe_batch_depends_only_on_the_vocabulary_size() -> None:
    small, large = make_config(ranks=1), make_config(ranks=1, model={"d_model": 64, "n_layers": 1}, run={"seed": 9})
    assert torch.equal(build_probe_batch(small.model).inputs_BS, build_probe_batch(large.model).inputs_BS)
    ids = build_probe_batch(small.model).inputs_BS
    assert (int(ids.min()) >= 0, int(ids.max()) < 130) == (True, True)
    assert len(ids.unique()) > 60
    assert select_logits(torch.arange(3.0)) == (0.0, 1.0, 2.0)
