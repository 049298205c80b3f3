"""Rules across config sections, and the values that `resolve_config` derives. Each error says which value is valid."""

import itertools
import re

import pytest

from dist_llm.config.check import check
from dist_llm.config.derive import AXES, format_divisors, resolve_config, resolve_dp_shard, round_up
from dist_llm.config.describe import describe_keys
from dist_llm.config.schema import UnresolvedConfig
from dist_llm.config.sequence_lengths import SPECIAL_TOKENS, compute_component_lengths
from dist_llm.data.shard import CorpusManifest
from dist_llm.errors import ConfigError
from dist_llm.training.settings import read_config

TOKENIZER_SIZE = 300  # token ids of the corpus
KEYS = {row[0] for row in describe_keys()}


def make_config(**keys):
    """Return a valid config with these keys changed. `__` stands for the dot of a key."""
    sections = {
        "run": {"dir": "runs/x", "steps": 20},
        "model": {"d_model": 32, "n_layers": 2, "n_heads": 4},
        "data": {"path": "corpus", "seq_len": 8, "global_batch": 12},
    }
    for name, value in keys.items():
        section, _, key = name.partition("__")
        if key:
            sections.setdefault(section, {})[key] = value
        else:
            sections[section] = value
    return UnresolvedConfig.model_validate(sections)


def test_sizes_that_the_objective_implies_are_derived():
    """The vocabulary includes the ids of the objective. max_seq_len is the longer sequence of an encoder-decoder."""
    config = resolve_config(
        make_config(model__architecture="encoder_decoder", objective__name="span", data__seq_len=64),
        world_size=1,
        tokenizer_size=TOKENIZER_SIZE,
    )
    lengths = compute_component_lengths(config)[0]
    assert config.model.vocab_size == TOKENIZER_SIZE + len(SPECIAL_TOKENS) + lengths.num_spans
    assert config.model.n_encoder_layers == config.model.n_layers == 2
    assert config.model.max_seq_len == 64
    assert (
        resolve_config(make_config(), world_size=1, tokenizer_size=TOKENIZER_SIZE).model.vocab_size == TOKENIZER_SIZE
    ), "causal got additional ids"
    assert resolve_config(make_config(), world_size=1, tokenizer_size=TOKENIZER_SIZE).model.n_encoder_layers == 0


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_a_valid_config_violates_no_rule(world_size):
    assert check(make_config(), world_size, TOKENIZER_SIZE) == []


VIOLATIONS = [  # (changed keys, world size, key of the violation, pattern of the message)
    (
        {"parallel__activations_gib": 1.0, "parallel__recompute": "full"},
        1,
        "parallel.activations_gib",
        "the activation budget chooses what each block recomputes; set recompute to none, or activations_gib to off",
    ),
    (
        {
            "parallel__pp": 2,
            "parallel__pp_schedule": "zbv",
            "parallel__recompute": "selective",
            "model__n_layers": 4,
            "data__micro_batch": 3,
        },
        2,
        "parallel.recompute",
        "set recompute to full or none, or pp_schedule to 1f1b or interleaved_1f1b",
    ),
    (
        {"parallel__tp": 2, "parallel__async_tp": True},
        2,
        "parallel.async_tp",
        "set compile and sequence_parallel to true",
    ),
    (
        {
            "parallel__tp": 2,
            "parallel__sequence_parallel": False,
            "parallel__recompute": "selective",
            "compile": True,
            "model__dropout": 0.1,
        },
        2,
        "parallel.recompute",
        "set sequence_parallel to true, or compile to false, or recompute to full",
    ),
    ({"fp8": True}, 1, "fp8", "true with precision fp32: .* set precision to bf16, or fp8 to false"),
    ({"fp8": True, "precision": "fp16"}, 1, "fp8", "true with precision fp16"),
    (
        {"fp8": True, "precision": "bf16", "model__n_kv_heads": 1},
        1,
        "model.n_kv_heads",
        "a matrix dimension of 8 is not supported in float8, which needs multiples of 16; change it, or set fp8",
    ),
    (
        {"fp8": True, "precision": "bf16", "model__output_gate": "per_head"},
        1,
        "model.n_heads",
        "a matrix dimension of 4 is not supported in float8, which needs multiples of 16; change it, or set fp8",
    ),
    (
        {"fp8": True, "precision": "bf16", "model__d_model": 40, "model__n_heads": 2, "model__head_dim": 16},
        1,
        "model.d_model",
        "a matrix dimension of 40 is not",
    ),
    (
        {"fp8": True, "precision": "bf16", "model__d_ff": 48, "parallel__tp": 2},
        2,
        "model.d_ff",
        "a matrix dimension of 48, 24 on a rank of tp 2, is not supported in float8",
    ),
    ({"checkpoint__keep_best": 1}, 1, "checkpoint.keep_best", "eval.every is off and checkpoint.every is 500"),
    (
        {"checkpoint__keep_best": 1, "eval__every": 300},
        1,
        "checkpoint.keep_best",
        "set eval.every to a divisor of checkpoint.every",
    ),
    (
        {"optim__name": "sgd", "model__parametrization": {"base_d_model": 8}},
        1,
        "optim.name",
        "sgd with parametrization: learning rates are scaled for AdamW; set adamw",
    ),
    (
        {"model__init": "xavier", "model__parametrization": {"base_d_model": 8}},
        1,
        "model.init",
        "the other initial values depend on the width by themselves; set gpt2",
    ),
    (
        {
            "model__norm_order": "post",
            "model__parametrization": {"name": "completep", "base_d_model": 8, "base_n_layers": 2},
        },
        1,
        "model.norm_order",
        "completep scales pre-norm residuals; set pre",
    ),
    (
        {
            "model__architecture": "encoder_decoder",
            "objective__name": "span",
            "data__seq_len": 64,
            "model__parametrization": {"name": "completep", "base_d_model": 8, "base_n_layers": 2},
        },
        1,
        "model.parametrization.name",
        "an encoder_decoder has two; set parametrization.name=mup",
    ),
    (
        {"model__attention_scale": 1.0, "model__parametrization": {"base_d_model": 8, "base_head_dim": 8}},
        1,
        "model.parametrization.base_head_dim",
        "has no effect with attention_scale 1.0",
    ),
    (
        {"optim__groups": [{"pattern": "a", "freeze": True}, {"pattern": "b"}]},
        1,
        "optim.groups.1.pattern",
        "the group changes nothing; set lr_mult",
    ),
    (
        {"optim__groups": [{"pattern": "a", "freeze": True, "lr_mult": 2.0}]},
        1,
        "optim.groups.0.lr_mult",
        "has no effect on frozen parameters",
    ),
    (
        {"optim__weight_decay": 0.0, "optim__groups": [{"pattern": "a", "weight_decay_mult": 2.0}]},
        1,
        "optim.groups.0.weight_decay_mult",
        "without optim.weight_decay above 0",
    ),
    (
        {"engine": "deepspeed", "optim__groups": [{"pattern": "a", "freeze": True}]},
        1,
        "optim.groups.0.freeze",
        "DeepSpeed keeps the weights of a run",
    ),
    (
        {
            "parallel__pp": 2,
            "parallel__pp_schedule": "interleaved_zero_bubble",
            "model__n_layers": 4,
            "data__micro_batch": 3,
            "optim__groups": [{"pattern": "a", "freeze": True}],
        },
        2,
        "optim.groups.0.freeze",
        "interleaved_zero_bubble computes wrong gradients",
    ),
    (
        {"optim__name": "muon", "parallel__cpu_offload": True},
        2,
        "optim.name",
        "muon does not support parallel.cpu_offload",
    ),
    ({"init_optimizer": "keep"}, 1, "init_optimizer", "keep needs init_from"),
    ({"data__path": ""}, 1, "data.path", "name one corpus in path, or several in sources; neither is set"),
    (
        {"data__sources": [{"name": "a", "path": "x"}]},
        1,
        "data.path",
        "name one corpus in path, or several in sources; both are set",
    ),
    (
        {"data__path": "", "data__sources": [{"name": "a", "path": "x"}, {"name": "a", "path": "y"}]},
        1,
        "data.sources.1.name",
        "'a' is already the name of an earlier source",
    ),
    (
        {"data__path": "", "data__sources": [{"name": "a", "path": "x", "weight": 1.0}, {"name": "b", "path": "y"}]},
        1,
        "data.sources",
        r"set the weight of all sources, or of none to use epochs; without a weight: b$",
    ),
    (
        {
            "data__path": "",
            "data__sources": [
                {"name": "a", "path": "x", "weight": 1.0},
                {"name": "b", "path": "y", "weight": 1e-5},
            ],
        },
        1,
        "data.sources",
        "b has 1.0e-05 of the samples; the smallest share is 1/10000",
    ),
    (
        {"data__stages": [{"from_tokens": 5, "weights": {"a": 1.0}}]},
        1,
        "data.stages",
        "stages are weights of sources, but there is one corpus",
    ),
    (
        {
            "data__path": "",
            "data__sources": [{"name": "a", "path": "x"}, {"name": "b", "path": "y"}],
            "data__stages": [{"from_tokens": 5, "weights": {"a": 1.0, "b": 0.0, "c": 1.0}}],
        },
        1,
        "data.stages.0.weights",
        "no source is named c; there are a, b",
    ),
    ({"data__skip": [[3, 3]]}, 1, "data.skip.0", r"\[3, 3\) is empty; write \[from, to\] with from < to"),
    ({"data__skip": [[3, 9], [5, 12]]}, 1, "data.skip", "ranges must ascend and not overlap"),
    (
        {"data__windows": "packed", "objective__name": "fim"},
        1,
        "data.windows",
        "packed yields texts of any length, which fim does not support; set windows to stream, or the objective to "
        "causal or masked",
    ),
    (
        {"objective__name": "span", "model__vocab_multiple": 1, "parallel__tp": 2},
        2,
        "model.vocab_multiple",
        "309 vocabulary rows do not divide over tp 2",
    ),
    (
        {
            "model__architecture": "encoder_decoder",
            "objective__name": "span",
            "parallel__pp": 2,
            "parallel__pp_schedule": "zbv",
            "data__micro_batch": 2,
        },
        2,
        "parallel.pp_schedule",
        "a stage both uses it and sends it on; set pp_schedule to 1f1b",
    ),
    (
        {"model__positions": "relative", "model__relative_distance": 16},
        1,
        "model.relative_buckets",
        "32 buckets give 16 exact distances, but relative_distance is 16; set at least 2 buckets",
    ),
    (
        {"objective__name": "masked"},
        1,
        "objective.name",
        "masked is not an objective for model.architecture decoder, which supports causal or prefix or span or fim; "
        "masked needs encoder$",
    ),
    (
        {"model__architecture": "encoder"},
        1,
        "objective.name",
        "causal is not an objective for model.architecture encoder, which supports masked; causal needs decoder$",
    ),
    (
        {"model__architecture": "encoder_decoder", "objective__name": "fim"},
        1,
        "objective.name",
        "fim is not an objective for .* encoder_decoder, which supports prefix or span; fim needs decoder$",
    ),
    (
        {"objective__mixture": [{"name": "span"}, {"name": "masked"}]},
        1,
        "objective.mixture.1.name",
        "masked is not an objective for model.architecture decoder",
    ),
    (
        {"objective__name": "span", "data__seq_len": 4},
        1,
        "data.seq_len",
        "4 is too short: span needs at least 5 tokens",
    ),
    (
        {"model__n_encoder_layers": 2},
        1,
        "model.n_encoder_layers",
        "only used with an encoder_decoder, but this is a decoder; remove the key",
    ),
    (
        {"objective__name": "span", "model__vocab_size": 305},
        1,
        "model.vocab_size",
        "305 is smaller than the 300 ids of the corpus's tokenizer and 9 of the objective; set at least 309, or null",
    ),
    (
        {"model__architecture": "encoder_decoder", "objective__name": "span", "parallel__cp": 2},
        2,
        "parallel.cp",
        "context parallelism does not support encoder_decoder; set cp to 1",
    ),
    (
        {"model__positions": "relative", "parallel__pp": 2, "data__micro_batch": 2},
        2,
        "parallel.pp",
        "share one table of relative positions, which cannot be split over stages",
    ),
    ({"model__n_heads": 5}, 1, "model.n_heads", "set n_heads to one of 1, 2, 4, 8, 16, 32, or set model.head_dim"),
    (
        {"model__n_heads": 32},
        1,
        "model.n_heads",
        "a head has 1 dimensions; set an even head_dim, or make d_model / n_heads",
    ),
    ({"model__head_dim": 7}, 1, "model.n_heads", "a head has 7 dimensions"),
    ({"model__n_kv_heads": 3}, 1, "model.n_kv_heads", "do not divide 4 query heads; set one of 1, 2, 4"),
    ({"model__vocab_size": 299}, 1, "model.vocab_size", "299 is smaller than the 300 ids .* at least 300, or null"),
    ({"model__max_seq_len": 7}, 1, "data.seq_len", "8 is longer than model.max_seq_len 7; lower it, or set max_seq"),
    (
        {"schedule__warmup_steps": 11, "schedule__decay_steps": 10},
        1,
        "schedule.warmup_steps",
        "the warmup ends at step 11, after the decay at step 10; set at most 10",
    ),
    (
        {"parallel__cp": 2, "data__seq_len": 10},
        2,
        "data.seq_len",
        "10 tokens do not divide into the 4 chunks of cp 2 .* the nearest that do: 8 or 12",
    ),
    ({"parallel__cp": 8, "data__seq_len": 4}, 8, "data.seq_len", "16 chunks of cp 8 .* the nearest that do: 16$"),
    ({"parallel__tp": 2, "model__n_kv_heads": 1}, 2, "model.n_kv_heads", "1 key-value heads .* tp 2; tp can be 1$"),
    ({"parallel__tp": 2, "model__d_ff": 9}, 2, "model.d_ff", "9 hidden units .* tp 2; tp can be 1, 3, 9$"),
    (
        {"parallel__tp": 2, "model__vocab_size": 305, "model__vocab_multiple": 5},
        2,
        "model.vocab_multiple",
        "305 vocabulary rows .* tp can be 1, 5, 61, 305$",
    ),
    ({"parallel__tp": 2, "data__seq_len": 7}, 2, "data.seq_len", "set a multiple of 2, or sequence_parallel to false"),
    (
        {"parallel__pp": 4, "data__micro_batch": 1},
        4,
        "parallel.pp",
        r"4 stages \(1f1b\) need at least 4 blocks, but the model has 2; pp can be at most 2",
    ),
    (
        {"parallel__pp": 2, "parallel__pp_schedule": "interleaved_1f1b", "data__micro_batch": 1},
        2,
        "parallel.pp",
        r"4 stages \(interleaved_1f1b\) .* pp can be at most 1",
    ),
    ({"parallel__pp": 2}, 2, "data.micro_batch", "1f1b over pp 2 needs at least 2 microbatches, but there are 1"),
    (
        {"parallel__pp": 2, "parallel__pp_schedule": "interleaved_1f1b", "model__n_layers": 4, "data__micro_batch": 4},
        2,
        "data.micro_batch",
        "interleaved_1f1b over pp 2 needs a multiple of pp 2 microbatches, but there are 3",
    ),
    (
        {"parallel__pp": 2, "parallel__pp_schedule": "zbv", "model__n_layers": 4, "data__micro_batch": 4},
        2,
        "data.micro_batch",
        "zbv over pp 2 needs at least 4 microbatches, but there are 3",
    ),
    (
        {
            "parallel__pp": 2,
            "parallel__pp_schedule": "zbv",
            "model__n_layers": 4,
            "data__micro_batch": 1,
            "compile": True,
        },
        2,
        "parallel.pp_schedule",
        "set compile to false, or pp_schedule to 1f1b or interleaved_1f1b",
    ),
    *(
        (
            {
                "parallel__pp": 2,
                "parallel__pp_schedule": schedule,
                "parallel__reshard": "always",
                "model__n_layers": 4,
                "data__micro_batch": 1,
            },
            4,
            "parallel.reshard",
            f"{schedule} computes weight gradients after activation gradients; .*; set reshard to default or never",
        )
        for schedule in ("zbv", "interleaved_zero_bubble")
    ),
    ({"parallel__dp_shard": 2}, 3, "parallel.dp_shard", "dp_shard 2. needs 2 ranks, but 3 were started; set dp_shard"),
    ({"parallel__dp_replicate": 2}, 3, "parallel.dp_shard", "needs 2 ranks, but 3 were started"),
    (
        {"parallel__dp_replicate": 2, "parallel__dp_shard": 2},
        1,
        "parallel.dp_shard",
        r"dp_replicate 2 x dp_shard 2.* needs 4 ranks.*torchrun --nproc-per-node 4 -m dist_llm train",
    ),
    ({"data__global_batch": 7}, 2, "data.global_batch", "2 data-parallel ranks x micro-batches of 1; .*: 6 or 8"),
    ({"data__global_batch": 3}, 4, "data.global_batch", "the nearest that do: 4$"),
    ({"data__micro_batch": 5}, 2, "data.global_batch", "x micro-batches of 5; the nearest that do: 10 or 20"),
]


@pytest.mark.parametrize(
    ("changed_keys", "world_size", "key", "message"), VIOLATIONS, ids=[str(rule[0]) for rule in VIOLATIONS]
)
def test_a_violation_names_its_key_and_the_fix(changed_keys, world_size, key, message):
    (violation,) = check(make_config(**changed_keys), world_size, TOKENIZER_SIZE)
    assert violation.keys[0] == key
    assert re.search(message, violation.message)
    for named_key in violation.keys:
        section, _, name = named_key.partition(".")
        name = name.split(".")[0]  # of a component of a mixture: the key of the mixture
        assert not name or f"{section}.{name}" in KEYS, f"{named_key} is not a key"


@pytest.mark.parametrize(
    "changed_keys",
    [
        {"model__n_heads": 5, "model__head_dim": 6},
        {"model__n_heads": 32, "model__positions": "learned"},
        {"model__vocab_size": 300},
        {"model__max_seq_len": 8},
        {"schedule__warmup_steps": 10, "schedule__decay_steps": 10},
        {"checkpoint__keep_best": 1, "eval__every": 250},
        {"schedule__warmup_steps": 1000},  # a trial of a long run may end inside its warmup
    ],
)
def test_unusual_but_valid_configs_pass(changed_keys):
    assert check(make_config(**changed_keys), world_size=1, tokenizer_size=TOKENIZER_SIZE) == []


@pytest.mark.parametrize(
    ("changed_keys", "world_size"),
    [
        ({"parallel__cp": 4}, 4),
        ({"parallel__tp": 4}, 4),
        ({"parallel__tp": 2, "data__seq_len": 7, "parallel__sequence_parallel": False}, 2),
        ({"parallel__tp": 2, "parallel__cp": 2, "parallel__dp_replicate": 3}, 12),
        ({"parallel__pp": 2, "data__micro_batch": 6}, 2),
        ({"fp8": True, "precision": "bf16", "parallel__tp": 2}, 2),
        ({"parallel__pp": 2, "parallel__pp_schedule": "gpipe"}, 2),
        ({"parallel__pp": 2, "parallel__pp_schedule": "zbv", "model__n_layers": 4, "data__micro_batch": 3}, 2),
        ({"parallel__pp": 2, "data__micro_batch": 1, "compile": True}, 2),
    ],
)
def test_valid_layouts_pass(changed_keys, world_size):
    assert check(make_config(**changed_keys), world_size, TOKENIZER_SIZE) == []


@pytest.mark.parametrize(
    ("torch_version", "is_refused"), [("2.11.0+cu130", True), ("2.12.1", True), ("2.13.0+cpu", False)]
)
def test_an_older_torch_cannot_split_backward(torch_version, is_refused, monkeypatch):
    monkeypatch.setattr("dist_llm.config.check_layout.version", {"torch": torch_version}.get)
    changed_keys = {"model__n_layers": 4, "data__micro_batch": 1, "parallel__pp": 2}
    for schedule in ("zbv", "interleaved_zero_bubble"):
        violations = check(
            make_config(**changed_keys, parallel__pp_schedule=schedule), world_size=2, tokenizer_size=TOKENIZER_SIZE
        )
        matches = [re.search("torch .* to 2.13", violation.message) is not None for violation in violations]
        assert matches == [True] * is_refused


def test_an_invalid_layout_is_one_violation_per_rule():
    violations = check(
        make_config(parallel__tp=3, parallel__pp=3, model__n_kv_heads=2), world_size=5, tokenizer_size=TOKENIZER_SIZE
    )
    assert [violation.keys[0] for violation in violations] == [
        "parallel.dp_shard",
        "model.n_heads",
        "model.n_kv_heads",
        "model.d_ff",
        "model.vocab_multiple",
        "data.seq_len",
        "parallel.pp",
        "data.micro_batch",
    ]


def test_the_suggested_batch_sizes_are_valid():
    for global_batch, micro_batch, world_size in itertools.product(range(1, 40), range(5), range(1, 5)):
        config = make_config(data__global_batch=global_batch, data__micro_batch=micro_batch)
        violations = check(config, world_size, TOKENIZER_SIZE)
        assert bool(violations) == bool(global_batch % (world_size * max(micro_batch, 1)))
        for batch_size in violations[0].message.rpartition(": ")[2].split(" or ") if violations else ():
            suggested_config = make_config(data__global_batch=int(batch_size), data__micro_batch=micro_batch)
            assert check(suggested_config, world_size, TOKENIZER_SIZE) == []


def test_rules_of_several_sections_are_reported_together():
    violations = check(
        make_config(model__n_kv_heads=3, data__global_batch=7, model__vocab_size=10),
        world_size=2,
        tokenizer_size=TOKENIZER_SIZE,
    )
    assert [violation.keys[0] for violation in violations] == [
        "model.n_kv_heads",
        "model.vocab_size",
        "data.global_batch",
    ]


@pytest.mark.parametrize(
    ("changed_keys", "d_ff"),
    [
        ({}, 128),  # 8/3 * 32 = 85.3, rounded up to a multiple of 64
        ({"model__d_model": 4096}, 10944),
        ({"model__activation": "gelu"}, 128),
        ({"model__activation": "gelu_tanh", "model__d_model": 36}, 144),
        ({"model__d_ff": 100}, 100),
    ],
)
def test_resolve_derives_d_ff(changed_keys, d_ff):
    assert resolve_config(make_config(**changed_keys), world_size=1, tokenizer_size=TOKENIZER_SIZE).model.d_ff == d_ff


def test_resolve_derives_all_missing_sizes():
    config = make_config(data__global_batch=12, parallel__dp_replicate=2)
    resolved = resolve_config(config, world_size=6, tokenizer_size=TOKENIZER_SIZE)
    model = resolved.model
    assert (model.n_kv_heads, model.head_dim, model.vocab_size, model.max_seq_len) == (4, 8, TOKENIZER_SIZE, 8)
    assert resolved.data.micro_batch == 2
    assert resolved.parallel.dp_shard == 3
    assert resolved.schedule.decay_steps == 20


def test_resolve_keeps_explicit_values():
    config = make_config(
        model__n_kv_heads=2,
        model__head_dim=16,
        model__vocab_size=512,
        model__max_seq_len=64,
        data__micro_batch=3,
        schedule__decay_steps=7,
        parallel__dp_shard=2,
    )
    resolved = resolve_config(config, world_size=2, tokenizer_size=TOKENIZER_SIZE)
    assert resolved.model.model_dump() == {**config.model.model_dump(), "d_ff": 128, "n_encoder_layers": 0}
    for section in ("data", "schedule", "parallel"):
        assert getattr(resolved, section).model_dump() == getattr(config, section).model_dump()
    assert resolve_config(resolved, world_size=2, tokenizer_size=TOKENIZER_SIZE) == resolved
    assert check(resolved, world_size=2, tokenizer_size=TOKENIZER_SIZE) == []


def test_round_up_gives_the_next_multiple():
    assert [round_up(n, multiple=4) for n in (0, 1, 4, 5)] == [0, 4, 4, 8]


def test_format_divisors_shortens_long_lists():
    assert format_divisors(12) == "1, 2, 3, 4, 6, 12"
    assert format_divisors(5040).split(", ")[7:10] == ["8", "...", "1680"]


def test_resolve_dp_shard_uses_the_remaining_ranks():
    assert resolve_dp_shard(make_config(parallel__dp_replicate=2).parallel, world_size=8) == 4
    assert resolve_dp_shard(make_config(parallel__dp_replicate=4).parallel, world_size=2) == 1


def test_order_of_mesh_axes_is_stable():
    assert AXES == ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@pytest.fixture
def corpus_directory(tmp_path):
    """Write the manifest of a corpus of TOKENIZER_SIZE ids."""
    CorpusManifest("uint16", TOKENIZER_SIZE, "", ("here",), {"train": (), "heldout": ()}).save(tmp_path)
    return tmp_path


@pytest.fixture
def read_with_overrides(corpus_directory, tmp_path):
    """Return a function that reads a valid config with overrides."""
    path = tmp_path / "config.yaml"
    path.write_text(
        f"run: {{dir: r, steps: 20}}\nmodel: {{d_model: 32, n_layers: 2, n_heads: 4}}\n"
        f"data: {{path: '{corpus_directory}', seq_len: 8, global_batch: 12}}\n"
    )
    return lambda *overrides, world_size=1: read_config(path, overrides, world_size)


def test_read_config_takes_the_vocabulary_from_the_corpus(read_with_overrides):
    assert read_with_overrides().model.vocab_size == TOKENIZER_SIZE


def test_one_error_lists_schema_errors_and_rules_across_sections(read_with_overrides):
    with pytest.raises(ConfigError) as excinfo:
        read_with_overrides("optim.lr=0", "log.evry=1", "model.n_kv_heads=3", "data.global_batch=7", world_size=2)
    message = str(excinfo.value)
    assert message.startswith("4 problems in the config:")
    for key in ("optim.lr:", "log.evry:", "model.n_kv_heads:", "data.global_batch:"):
        assert message.count(f"\n  {key}") == 1


def test_a_missing_corpus_is_reported_with_other_problems(read_with_overrides, tmp_path):
    with pytest.raises(ConfigError) as excinfo:
        read_with_overrides(f"data.path={tmp_path / 'nowhere'}", "model.n_kv_heads=3")
    assert "data.path: " in str(excinfo.value)
    assert "not a prepared corpus" in str(excinfo.value)
    assert "model.n_kv_heads: " in str(excinfo.value)


def test_a_consequence_of_another_error_is_not_reported(read_with_overrides):
    """micro_batch is invalid. The check that it divides global_batch would add a second error for the same key."""
    with pytest.raises(ConfigError, match=r"^1 problem in the config:\n  data\.micro_batch: "):
        read_with_overrides("data.micro_batch=-5", "data.global_batch=7", world_size=2)


@pytest.mark.parametrize("override", ["run.steps=x", "model.d_model=x", "model.n_heads=x", "data.seq_len=0"])
def test_an_invalid_required_number_neither_hides_nor_adds_violations(override, read_with_overrides):
    layout = ("parallel.tp=3", "model.n_kv_heads=0", "model.vocab_multiple=3", "parallel.sequence_parallel=false")
    with pytest.raises(ConfigError) as excinfo:
        read_with_overrides(override, "data.global_batch=7", *layout, world_size=6)
    problems = {line.split(":")[0].strip() for line in str(excinfo.value).splitlines()[1:-1]}
    assert problems >= {override.partition("=")[0], "data.global_batch"}
    # Keys that tp 3 violates if the other numbers are valid.
    keys_of_tp = {"model.n_heads", "model.n_kv_heads", "model.d_ff"}
    assert problems <= {override.partition("=")[0], "data.global_batch"} | keys_of_tp
    if override.startswith("model.n_heads"):
        assert "model.n_kv_heads" not in problems
    if override.startswith("model.d_model"):
        assert "model.d_ff" not in problems
