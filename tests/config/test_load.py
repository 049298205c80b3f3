"""load_config turns YAML and overrides into a config. One error lists all violations with their keys and a fix."""

import dataclasses
import typing

import pytest
import yaml
from pydantic import BaseModel

from dist_llm.config.data_sections import SourceConfig, StageConfig
from dist_llm.config.describe import describe_keys
from dist_llm.config.key_suggestions import ALIASES
from dist_llm.config.load import dump_config, load_config, raise_violations
from dist_llm.config.optim_sections import AdamWConfig, ParamGroup, ScheduleConfig, WSDConfig
from dist_llm.config.schema import UnresolvedConfig
from dist_llm.config.section import get_union_members
from dist_llm.config.yaml_parser import parse_yaml
from dist_llm.errors import ConfigError
from dist_llm.optim.schedule import learning_rate

MINIMAL = {
    "run": {"dir": "runs/x", "steps": 20},
    "model": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "data": {"path": "corpus", "seq_len": 8, "global_batch": 4},
}
SECTIONS = [
    name
    for name, field in UnresolvedConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
]
KEYS = [row[0] for row in describe_keys()]


@pytest.fixture
def write_config(tmp_path):
    """Return a function that writes a config, given as text or as nested dicts, and returns its path."""

    def write_content(content, name="config.yaml"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return path

    return write_content


@pytest.fixture
def load_minimal(write_config):
    """Return a function that loads MINIMAL with overrides and returns (config, violations as text)."""

    def load_with_overrides(*overrides, **options):
        config, violations = load_config(write_config(MINIMAL), overrides, **options)
        return config, [str(violation) for violation in violations]

    return load_with_overrides


def test_the_minimal_config_has_the_defaults(load_minimal):
    config, violations = load_minimal()
    assert violations == []
    assert config == UnresolvedConfig.model_validate(MINIMAL)
    assert (config.run.steps, config.optim.lr, config.schedule.name) == (20, 3e-4, "cosine")


@pytest.mark.parametrize("section", SECTIONS)
def test_an_unknown_key_names_its_path_and_the_nearest(section, load_minimal):
    """The test adds a letter to each key of the section."""
    for key in [key for key in KEYS if key.startswith(section + ".") and key.count(".") == 1]:
        misspelled_key = key + "x"
        config, violations = load_minimal(f"{misspelled_key}=1")
        assert len(violations) == 1
        assert violations[0].startswith(f"{misspelled_key}: unknown key; did you mean {section}.")
        # Another short key (`lr`, `tp`) may be as near.
        assert len(key.split(".")[1]) < 4 or f"did you mean {key}?" in violations[0]
        assert config is not None, "there is no config with the other keys"


def test_an_unknown_key_of_a_nested_union_names_the_nearest(load_minimal):
    _, violations = load_minimal(
        "model.rope_scaling={name: llama3, factor: 8.0, original_max_seq_len: 8, high_freq: 4.0}"
    )
    assert violations == [
        "model.rope_scaling.high_freq: unknown key; did you mean model.rope_scaling.high_freq_factor?"
    ]
    _, violations = load_minimal("model.rope_scaling={name: linear, factor: 8.0, beta_fast: 4.0}")
    assert violations[0].startswith("model.rope_scaling.beta_fast: ")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("lr=1e-3", "lr: unknown key; did you mean optim.lr?"),
        ("modle.d_model=3", "modle: unknown key; did you mean model?"),
        ("enginee=native", "enginee: unknown key; did you mean engine?"),
        ("optim.warmup_steps=3", "optim.warmup_steps: unknown key; did you mean schedule.warmup_steps?"),
        ("optim.warmup_step=3", "optim.warmup_step: unknown key; did you mean schedule.warmup_steps?"),
        ("run.every=3", "run.every: unknown key; did you mean checkpoint.every or eval.every or log.every?"),
        ("optim.learning_rate=1e-3", "optim.learning_rate: unknown key; did you mean optim.lr?"),
        ("batch_size=3", "batch_size: unknown key; did you mean data.global_batch?"),
        ("optimizer.lr=3", "optimizer: unknown key; did you mean optim?"),
        (
            "run.network.PATH=x",
            "run.network.PATH: string should match pattern '^(NCCL|TORCH_NCCL|GLOO|UCX|FI)_[A-Z0-9_]+$', found 'PATH'",
        ),
        ("run.zzz=3", "run.zzz: unknown key; valid here: dir, steps, seed, hang_seconds, network"),
    ],
)
def test_a_key_in_the_wrong_section_is_located(override, complaint, load_minimal):
    assert load_minimal(override)[1] == [complaint]


def test_every_alias_is_a_valid_key():
    assert set(ALIASES.values()) <= {*KEYS, *UnresolvedConfig.model_fields}
    assert not set(ALIASES) & {key.rpartition(".")[2] for key in KEYS}, "a valid key is also an alias"


def test_valid_keys_are_listed_once(load_minimal):
    (complaint,) = load_minimal("zzz=1")[1]
    listed = complaint.removeprefix("zzz: unknown key; valid here: ").split(", ")
    assert sorted(listed) == sorted({*UnresolvedConfig.model_fields, "base"})


@pytest.mark.parametrize("override", ["base=other.yaml", "base.deep=3"])
def test_a_base_on_the_command_line_is_refused(override, load_minimal):
    with pytest.raises(ConfigError, match=rf"^override '{override}': base is only for files"):
        load_minimal(override)


@pytest.mark.parametrize(
    "override",
    [
        "checkpoint.every='20'",
        "checkpoint.every=20.0",
        "checkpoint.every=true",
        "checkpoint.every=-1",
        "checkpoint.keep=0",
        "optim.lr='3e-4'",
        "optim.lr=0",
        "optim.lr=.nan",
        "optim.lr=.inf",
        "log.peak_tflops=.inf",
        "run.seed=-1",
        f"run.seed={2**63}",
        "optim.beta1=1.0",
        "optim.clip=-1",
        "optim.decay_embeddings=1",
        "optim.decay_embeddings='true'",
        "optim.name=adam",
        "optim=3",
        "loss.label_smoothing=[0.1]",
        "schedule.min_ratio=1.5",
        "eval.sample_prompt=3",
        "parallel.dp_shard=-2",
        "compile=null",
        "data.order=shufle",
    ],
)
def test_types_and_ranges_are_strict(override, load_minimal):
    _, violations = load_minimal(override)
    key, _, value = override.partition("=")
    assert len(violations) == 1
    assert violations[0].startswith(f"{key}")
    assert repr(yaml.safe_load(value)) in violations[0], "the message must show the value"


@pytest.mark.parametrize("name", ["order", "verify"])
def test_an_invalid_choice_lists_the_valid_ones(name, load_minimal):
    _, (violation,) = load_minimal(f"data.{name}=neither")
    for choice in typing.get_args(UnresolvedConfig.model_fields["data"].annotation.model_fields[name].annotation):
        assert repr(choice) in violation


def test_all_violations_are_reported_at_once(load_minimal):
    config, violations = load_minimal("optim.lr=0", "log.evry=3", "nonsense=1", "compile=1")
    assert sorted(violation.split(":")[0] for violation in violations) == [
        "compile",
        "log.evry",
        "nonsense",
        "optim.lr",
    ]
    assert config == UnresolvedConfig.model_validate(MINIMAL), "the config must not have the invalid keys"


def test_missing_keys_are_reported_without_a_config(write_config):
    config, violations = load_config(write_config({"run": {"dir": "x"}, "model": MINIMAL["model"]}))
    assert config is None
    assert [str(violation) for violation in violations] == ["run.steps: must be set", "data: must be set"]


@pytest.mark.parametrize("content", [{}, {"run": {"dir": "x"}}])
def test_missing_keys_are_reported_once_beside_other_errors(content, write_config):
    _, violations = load_config(
        write_config({**MINIMAL, "data": {}, **content}), ["optim.lr=0", "log.evry=3", "run.steps=x"]
    )
    assert sorted(violation.keys[0] for violation in violations) == [
        "data.global_batch",
        "data.seq_len",
        "log.evry",
        "optim.lr",
        "run.steps",
    ]


@pytest.mark.parametrize("key", ["run.steps", "model.d_model", "model.n_layers", "data.seq_len", "data.global_batch"])
@pytest.mark.parametrize("override", ["{}=x", "{}=0", "{}=null"])
def test_an_invalid_required_number_is_one_violation(key, override, load_minimal):
    config, (violation,) = load_minimal(override.format(key), "optim.clip=3.0")
    assert violation.startswith(f"{key}: input should be ")
    assert config.optim.clip == 3.0


def test_raise_violations_lists_every_violation(load_minimal, write_config):
    _, violations = load_config(write_config(MINIMAL), ["optim.lr=0", "log.evry=3"])
    with pytest.raises(ConfigError, match=r"^2 problems in the config:\n  .*optim\.lr.*\n  .*log\.evry"):
        raise_violations(sorted(violations, key=str, reverse=True))
    with pytest.raises(ConfigError, match=r"^1 problem in the config:"):
        raise_violations(violations[:1])
    raise_violations([])


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("run.steps=7", "run.steps", 7),
        ("optim.lr=3e-4", "optim.lr", 3e-4),
        ("optim.lr=1E-3", "optim.lr", 1e-3),
        ("optim.lr=2.5e+0", "optim.lr", 2.5),
        ("optim.lr=.5e-1", "optim.lr", 0.05),
        ("optim.lr=1", "optim.lr", 1.0),
        ("compile=true", "compile", True),
        ("run.dir=a=b", "run.dir", "a=b"),
        ("run.dir='3'", "run.dir", "3"),
        ("run.dir=1e-3x", "run.dir", "1e-3x"),
        ("run.dir=12:30", "run.dir", "12:30"),
        ("run.steps=010", "run.steps", 10),
        ("run.steps=1_000", "run.steps", 1000),
        (f"run.seed={2**63 - 1}", "run.seed", 2**63 - 1),
        ("eval.sample_prompt='def '", "eval.sample_prompt", "def "),
    ],
)
def test_an_override_is_yaml(override, key, value, load_minimal):
    config, violations = load_minimal(override)
    value_of_key = config
    for attribute in key.split("."):
        value_of_key = getattr(value_of_key, attribute)
    assert (violations, value_of_key, type(value_of_key)) == ([], value, type(value))


def test_null_is_refused_where_nothing_can_be_derived(load_minimal):
    assert load_minimal("log.every=null")[1] == ["log.every: input should be a valid integer, found None"]


@pytest.mark.parametrize("value", ["off", "null", "false", "0"])
def test_off_null_false_and_zero_disable_a_feature(load_minimal, value):
    config, violations = load_minimal(f"checkpoint.every={value}", f"optim.clip={value}", f"model.logit_cap={value}")
    assert violations == []
    assert (config.checkpoint.every, config.optim.clip, config.model.logit_cap) == (None, None, None)


def test_off_is_refused_where_null_means_derived(load_minimal):
    assert load_minimal("model.head_dim=off")[1] == ["model.head_dim: input should be a valid integer, found False"]


def test_true_and_negative_sizes_are_refused(load_minimal):
    assert load_minimal("checkpoint.every=true")[1] == ["checkpoint.every: input should be a valid integer, found True"]
    assert load_minimal("model.head_dim=-1")[1] == [
        "model.head_dim: input should be greater than or equal to 1, found -1"
    ]


def test_an_outdated_zero_is_accepted_with_a_message(load_minimal, caplog):
    config, violations = load_minimal(
        "model.d_ff=0", "optim.clip=0.0", "parallel.dp_shard=-1", "data.prefetch=0", log_outdated=True
    )
    assert violations == []
    assert (config.model.d_ff, config.optim.clip, config.parallel.dp_shard) == (None, None, None)
    assert caplog.messages == [
        "model.d_ff: 0 still means null, but a later version will refuse it; write null",
        "optim.clip: 0.0 still means off, but a later version will refuse it; write off",
        "parallel.dp_shard: -1 still means null, but a later version will refuse it; write null",
    ]


def test_an_outdated_zero_in_a_list_is_reported(load_minimal, caplog):
    load_minimal("data.sources=[{name: a, path: a, weight: 0}, {name: b, path: b}]", log_outdated=True)
    assert [message.split(":")[0] for message in caplog.messages] == ["data.sources.0.weight"]


def test_a_saved_config_with_outdated_zeros_is_read_without_messages(write_config, caplog):
    """Only the start of a run asks for them: many commands read configs that a run has saved."""
    load_config(write_config({**MINIMAL, "optim": {"clip": 0.0, "lr": 1e-3}}))
    assert caplog.messages == []


@pytest.mark.parametrize(("score_prompts", "weight"), [("true", 1.0), ("false", 0.0)])
def test_a_renamed_key_is_accepted_with_a_message(score_prompts, weight, load_minimal, caplog):
    config, violations = load_minimal(f"data.score_prompts={score_prompts}", log_outdated=True)
    assert violations == []
    assert config.data.prompt_loss_weight == weight
    assert caplog.messages == [
        "data.score_prompts: the key is still accepted, but a later version will refuse it; write prompt_loss_weight: "
        f"{weight}"
    ]


def test_a_renamed_key_with_a_bad_value_or_next_to_the_new_key_is_refused(load_minimal):
    for overrides in (["data.score_prompts=2"], ["data.score_prompts=true", "data.prompt_loss_weight=0.5"]):
        (violation,) = load_minimal(*overrides)[1]
        assert violation.startswith("data.score_prompts: ")


def test_later_overrides_win(load_minimal):
    config, _ = load_minimal("run.steps=1", "run.steps=2")
    assert config.run.steps == 2


@pytest.mark.parametrize("override", ["run.steps", "=3", "run.steps.deep=3", "run.steps=[1,", "compile.deep.er=3"])
def test_a_malformed_override_is_quoted(override, load_minimal):
    if override.startswith("compile"):
        with pytest.raises(ConfigError, match="'compile' is a value, not a section"):
            load_minimal("compile=true", override)
        return
    with pytest.raises(ConfigError) as excinfo:
        load_minimal(override)
    assert str(excinfo.value).startswith(f"override '{override}'")


def test_bases_merge_key_by_key(write_config, tmp_path):
    (tmp_path / "deep").mkdir()
    write_config({**MINIMAL, "optim": {"lr": 1.0, "clip": 2.0}}, "deep/ground.yaml")
    write_config({"base": "ground.yaml", "optim": {"lr": 3.0}, "compile": True}, "deep/base.yaml")
    top_config = write_config({"base": "deep/base.yaml", "run": {"steps": 5}, "compile": False})

    config, violations = load_config(top_config, ["optim.eps=0.5"])

    assert violations == []
    assert (config.run.dir, config.run.steps) == ("runs/x", 5), "a file must take precedence over its base"
    assert (config.optim.lr, config.optim.clip, config.optim.eps) == (3.0, 2.0, 0.5)
    assert config.compile is False


def test_circular_bases_are_reported(write_config):
    config_a = write_config({"base": "b.yaml"}, "a.yaml")
    write_config({"base": "a.yaml"}, "b.yaml")
    with pytest.raises(ConfigError, match=r"leads back to itself: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        load_config(config_a)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("run:\n  steps: 1\n  dir: a\n  steps: 2\n", r"config\.yaml:4: key 'steps' is given twice"),
        ("run: {}\nmodel: {}\nrun: {}\n", r"config\.yaml:3: key 'run' is given twice"),
        ("run: [1\n", r"config\.yaml: not valid YAML"),
        ("- run\n", r"config\.yaml: a config is a mapping of sections, found list"),
        ("base: [a, b]\n", r"base: must be the path of one YAML file"),
        ("base: nowhere.yaml\n", r"nowhere\.yaml: cannot be read: No such file"),
        ("run: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("run:\n  ? [a]\n  : 3\n", r"config\.yaml:2: a key must be a plain word"),
        ("? {a: 1}\n: 3\n", r"config\.yaml:1: a key must be a plain word"),
        ("x: &a {y: *a}\n", r"config\.yaml: nested too deeply, or an alias \(\*\) inside its own anchor"),
        (f"x: {'[' * 5000}", r"config\.yaml: nested too deeply"),
        ("run: {dir: 2020-13-45}\n", r"config\.yaml: not valid YAML: month must be in 1\.\.12"),
        ("run: !!bool x\n", r"config\.yaml: not valid YAML"),
    ],
)
def test_an_invalid_file_is_reported(content, complaint, write_config):
    with pytest.raises(ConfigError, match=complaint):
        load_config(write_config(content))


def test_bytes_that_are_not_utf8_are_reported(tmp_path):
    (tmp_path / "config.yaml").write_bytes("run: {dir: é}".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.yaml: byte 11 is not UTF-8 text"):
        load_config(tmp_path / "config.yaml")


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file or directory"):
        load_config(tmp_path / "none.yaml")


def test_overrides_alone_can_be_a_config():
    overrides = [f"{section}.{key}={value}" for section, keys in MINIMAL.items() for key, value in keys.items()]
    assert load_config(None, overrides) == (UnresolvedConfig.model_validate(MINIMAL), [])


def test_a_dumped_config_loads_as_the_same_config(load_minimal, write_config):
    config, _ = load_minimal("optim.lr=1e-7", "optim.eps=1e-20", "compile=true", "eval.sample_prompt='a: \"b\"\\n'")
    assert load_config(write_config(dump_config(config), "dumped.yaml")) == (config, [])


def test_describe_covers_every_key_with_a_description():
    columns_by_key = {name: columns for name, *columns in describe_keys()}
    expected_keys = {"base", "model.from"}
    expected_keys |= {f"data.sources.*.{name}" for name in SourceConfig.model_fields}
    expected_keys |= {f"data.stages.*.{name}" for name in StageConfig.model_fields}
    expected_keys |= {f"optim.groups.*.{name}" for name in ParamGroup.model_fields}
    for name, field in UnresolvedConfig.model_fields.items():
        if name in SECTIONS:
            expected_keys |= {f"{name}.{inner}" for inner in field.annotation.model_fields}
            for inner, inner_field in field.annotation.model_fields.items():
                members = get_union_members(inner_field.annotation).values()
                expected_keys |= {f"{name}.{inner}.{last}" for member in members for last in member.model_fields}
        elif members := get_union_members(field.annotation):
            expected_keys |= {f"{name}.{inner}" for member in members.values() for inner in member.model_fields}
        else:
            expected_keys.add(name)
    assert set(columns_by_key) == expected_keys
    assert len(list(describe_keys())) == len(columns_by_key), "each key must be described once"
    for name, (kind, default, description) in columns_by_key.items():
        assert kind, name
        assert default, name
        assert len(description) > 5, name
    assert columns_by_key["run.steps"][:2] == ["int", "required"]
    assert columns_by_key["data.order"][:2] == ["shuffle | random", "shuffle"]
    assert columns_by_key["optim.lr"][:2] == ["float", "0.0003"]
    assert columns_by_key["compile"][:2] == ["bool", "false"]


def test_the_description_of_decay_steps_names_the_schedules_that_have_it():
    (description,) = [row[3] for row in describe_keys() if row[0] == "schedule.decay_steps"]
    assert description.startswith("cosine, linear, wsd: step at which")
    for name, schedule in get_union_members(ScheduleConfig).items():
        assert (name in description) == ("decay_steps" in schedule.model_fields), name
        if "decay_steps" in schedule.model_fields:
            rate = learning_rate(AdamWConfig(lr=1.0), schedule(decay_steps=10), step=10)
            assert rate == pytest.approx(0.1), "the learning rate must be the minimum at decay_steps"


def test_wsd_with_decay_fraction_0_drops_in_one_step():
    schedule = WSDConfig(decay_steps=10, decay_fraction=0.0)
    assert [learning_rate(AdamWConfig(lr=1.0), schedule, step) for step in (9, 10, 11)] == pytest.approx([1, 1, 0.1])
    description = WSDConfig.model_fields["decay_fraction"].description
    assert "0: the rate drops at once after decay_steps" in description


@pytest.mark.parametrize("text", ["3e-4", "1E5", ".5e3", "-2e3", "+1e0", "3.e2"])
def test_exponents_are_floats_as_in_yaml_1_2(text):
    assert parse_yaml(text, "location") == float(text)


@pytest.mark.parametrize("text", ["1e", "e5", "3e-4x", "0x1e5z"])
def test_text_that_resembles_an_exponent_stays_text(text):
    assert parse_yaml(text, "location") == text


def test_a_config_is_frozen(load_minimal):
    config, _ = load_minimal()
    with pytest.raises(ValueError, match="frozen"):
        config.run.steps = 3
    with pytest.raises(ValueError, match="frozen"):
        config.compile = True


def test_violations_compare_by_value():
    from dist_llm.config.load import Violation

    assert Violation(("a.b", "c"), "wrong") == Violation(("a.b", "c"), "wrong")
    assert str(Violation(("a.b", "c"), "wrong")) == "a.b: wrong"
    with pytest.raises(dataclasses.FrozenInstanceError):
        Violation(("a",), "x").message = "y"
