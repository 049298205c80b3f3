"""YAML and overrides -> a Config, or one error with every violation, each with its place and a way out."""

import dataclasses
import typing

import pytest
import yaml
from pydantic import BaseModel

from dist_llm.config.describe import describe
from dist_llm.config.load import dump, load_config, parse_yaml, refuse
from dist_llm.config.nearest import ALIASES
from dist_llm.config.optim_sections import AdamWConfig, ScheduleConfig, WSDConfig
from dist_llm.config.schema import Config, SourceConfig, StageConfig
from dist_llm.config.section import union_members
from dist_llm.errors import ConfigError
from dist_llm.optim.schedule import learning_rate

MINIMAL = {
    "run": {"dir": "runs/x", "steps": 20},
    "model": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "data": {"path": "corpus", "seq_len": 8, "global_batch": 4},
}
SECTIONS = [
    name
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
]
KEYS = [row[0] for row in describe()]


@pytest.fixture
def write(tmp_path):
    """Write a config, given as text or as nested dicts; return its path."""

    def write(content, name="config.yaml"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


@pytest.fixture
def load(write):
    """Load MINIMAL with overrides; return (config, violations as text)."""

    def load(*overrides):
        config, violations = load_config(write(MINIMAL), overrides)
        return config, [str(violation) for violation in violations]

    return load


def test_the_minimal_config_takes_the_defaults(load):
    config, violations = load()
    assert violations == []
    assert config == Config.model_validate(MINIMAL)
    assert (config.run.steps, config.optim.lr, config.schedule.name) == (20, 3e-4, "cosine")


@pytest.mark.parametrize("section", SECTIONS)
def test_an_unknown_key_names_its_path_and_the_nearest(section, load):
    """Each key of each section, with one letter too many."""
    for key in [key for key in KEYS if key.startswith(section + ".") and "*" not in key]:
        wrong = key + "x"
        config, violations = load(f"{wrong}=1")
        assert len(violations) == 1
        assert violations[0].startswith(f"{wrong}: unknown key; did you mean {section}.")
        # Among short keys a neighbour may be as near (`lr`, `tp`).
        assert len(key.split(".")[1]) < 4 or f"did you mean {key}?" in violations[0]
        assert config is not None, "the rest can still be checked"


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
def test_a_key_in_the_wrong_place_is_found_elsewhere(override, complaint, load):
    assert load(override)[1] == [complaint]


def test_every_alias_leads_to_a_key():
    assert set(ALIASES.values()) <= {*KEYS, *Config.model_fields}
    assert not set(ALIASES) & {key.rpartition(".")[2] for key in KEYS}, "a name of our own is no alias"


def test_what_is_valid_is_listed_once_each(load):
    (complaint,) = load("zzz=1")[1]
    listed = complaint.removeprefix("zzz: unknown key; valid here: ").split(", ")
    assert sorted(listed) == sorted({*Config.model_fields, "base"})


@pytest.mark.parametrize("override", ["base=other.yaml", "base.deep=3"])
def test_a_base_on_the_command_line_is_refused(override, load):
    with pytest.raises(ConfigError, match=rf"^override '{override}': base is only for files"):
        load(override)


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
def test_types_and_ranges_are_strict(override, load):
    _, violations = load(override)
    key, _, value = override.partition("=")
    assert len(violations) == 1
    assert violations[0].startswith(f"{key}")
    assert repr(yaml.safe_load(value)) in violations[0], "the message shows what was found"


@pytest.mark.parametrize("name", ["order", "verify"])
def test_a_wrong_choice_lists_the_right_ones(name, load):
    _, (violation,) = load(f"data.{name}=neither")
    for choice in typing.get_args(Config.model_fields["data"].annotation.model_fields[name].annotation):
        assert repr(choice) in violation


def test_all_violations_come_at_once(load):
    config, violations = load("optim.lr=0", "log.evry=3", "nonsense=1", "compile=1")
    assert sorted(violation.split(":")[0] for violation in violations) == [
        "compile",
        "log.evry",
        "nonsense",
        "optim.lr",
    ]
    assert config == Config.model_validate(MINIMAL), "what remains without the wrong keys"


def test_missing_keys_are_named_and_nothing_remains_to_check(write):
    config, violations = load_config(write({"run": {"dir": "x"}, "model": MINIMAL["model"]}))
    assert config is None
    assert [str(violation) for violation in violations] == ["run.steps: must be set", "data: must be set"]


@pytest.mark.parametrize("content", [{}, {"run": {"dir": "x"}}])
def test_what_is_missing_is_named_once_whatever_else_is_wrong(content, write):
    _, violations = load_config(write({**MINIMAL, "data": {}, **content}), ["optim.lr=0", "log.evry=3", "run.steps=x"])
    assert sorted(violation.keys[0] for violation in violations) == [
        "data.global_batch",
        "data.seq_len",
        "log.evry",
        "optim.lr",
        "run.steps",
    ]


@pytest.mark.parametrize("key", ["run.steps", "model.d_model", "model.n_layers", "data.seq_len", "data.global_batch"])
@pytest.mark.parametrize("override", ["{}=x", "{}=0", "{}=null"])
def test_a_required_number_that_is_wrong_is_one_problem_and_the_rest_remains(key, override, load):
    config, (violation,) = load(override.format(key), "optim.clip=3.0")
    assert violation.startswith(f"{key}: input should be ")
    assert config.optim.clip == 3.0


def test_refuse_lists_every_violation(load, write):
    _, violations = load_config(write(MINIMAL), ["optim.lr=0", "log.evry=3"])
    with pytest.raises(ConfigError, match=r"^2 problems in the config:\n  .*optim\.lr.*\n  .*log\.evry"):
        refuse(sorted(violations, key=str, reverse=True))
    with pytest.raises(ConfigError, match=r"^1 problem in the config:"):
        refuse(violations[:1])
    refuse([])


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
def test_an_override_is_yaml(override, key, value, load):
    config, violations = load(override)
    found = config
    for part in key.split("."):
        found = getattr(found, part)
    assert (violations, found, type(found)) == ([], value, type(value))


def test_null_is_null_and_later_overrides_win(load):
    assert load("checkpoint.every=null")[1] == ["checkpoint.every: input should be a valid integer, found None"]
    config, _ = load("run.steps=1", "run.steps=2")
    assert config.run.steps == 2


@pytest.mark.parametrize("override", ["run.steps", "=3", "run.steps.deep=3", "run.steps=[1,", "compile.deep.er=3"])
def test_a_malformed_override_is_quoted(override, load):
    if override.startswith("compile"):
        with pytest.raises(ConfigError, match="'compile' is a value, not a section"):
            load("compile=true", override)
        return
    with pytest.raises(ConfigError) as caught:
        load(override)
    assert str(caught.value).startswith(f"override '{override}'")


def test_bases_merge_key_by_key(write, tmp_path):
    (tmp_path / "deep").mkdir()
    write({**MINIMAL, "optim": {"lr": 1.0, "clip": 2.0}}, "deep/ground.yaml")
    write({"base": "ground.yaml", "optim": {"lr": 3.0}, "compile": True}, "deep/base.yaml")
    top = write({"base": "deep/base.yaml", "run": {"steps": 5}, "compile": False})

    config, violations = load_config(top, ["optim.eps=0.5"])

    assert violations == []
    assert (config.run.dir, config.run.steps) == ("runs/x", 5), "the top wins, key by key"
    assert (config.optim.lr, config.optim.clip, config.optim.eps) == (3.0, 2.0, 0.5)
    assert config.compile is False


def test_bases_that_lead_in_a_circle_are_shown(write):
    first = write({"base": "b.yaml"}, "a.yaml")
    write({"base": "a.yaml"}, "b.yaml")
    with pytest.raises(ConfigError, match=r"leads back to itself: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        load_config(first)


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
def test_a_bad_file_is_named(content, complaint, write):
    with pytest.raises(ConfigError, match=complaint):
        load_config(write(content))


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "config.yaml").write_bytes("run: {dir: é}".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.yaml: byte 11 is not UTF-8 text"):
        load_config(tmp_path / "config.yaml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file or directory"):
        load_config(tmp_path / "none.yaml")


def test_without_a_file_overrides_can_be_all():
    overrides = [f"{section}.{key}={value}" for section, keys in MINIMAL.items() for key, value in keys.items()]
    assert load_config(None, overrides) == (Config.model_validate(MINIMAL), [])


def test_dump_reads_back_as_itself(load, write):
    config, _ = load("optim.lr=1e-7", "optim.eps=1e-20", "compile=true", "eval.sample_prompt='a: \"b\"\\n'")
    assert load_config(write(dump(config), "dumped.yaml")) == (config, [])


def test_describe_covers_every_key_with_words():
    rows = {name: rest for name, *rest in describe()}
    wanted = {"base", "model.from"}
    wanted |= {f"data.sources.*.{name}" for name in SourceConfig.model_fields}
    wanted |= {f"data.stages.*.{name}" for name in StageConfig.model_fields}
    for name, field in Config.model_fields.items():
        if name in SECTIONS:
            wanted |= {f"{name}.{inner}" for inner in field.annotation.model_fields}
        elif members := union_members(field.annotation):
            wanted |= {f"{name}.{inner}" for member in members.values() for inner in member.model_fields}
        else:
            wanted.add(name)
    assert set(rows) == wanted
    assert len(list(describe())) == len(rows), "each key once"
    for name, (kind, default, description) in rows.items():
        assert kind, name
        assert default, name
        assert len(description) > 5, name
    assert rows["run.steps"][:2] == ["int", "required"]
    assert rows["data.order"][:2] == ["shuffle | random", "shuffle"]
    assert rows["optim.lr"][:2] == ["float", "0.0003"]
    assert rows["compile"][:2] == ["bool", "false"]


def test_the_description_of_decay_steps_names_the_schedules_that_have_it():
    (description,) = [row[3] for row in describe() if row[0] == "schedule.decay_steps"]
    assert description.startswith("cosine, linear, wsd: step at which")
    for name, schedule in union_members(ScheduleConfig).items():
        assert (name in description) == ("decay_steps" in schedule.model_fields), name
        if "decay_steps" in schedule.model_fields:
            rate = learning_rate(AdamWConfig(lr=1.0), schedule(decay_steps=10), 10)
            assert rate == pytest.approx(0.1), "the floor, at that step"


def test_wsd_without_a_decay_drops_as_its_description_says():
    schedule = WSDConfig(decay_steps=10, decay_fraction=0.0)
    assert [learning_rate(AdamWConfig(lr=1.0), schedule, step) for step in (9, 10, 11)] == pytest.approx([1, 1, 0.1])
    description = WSDConfig.model_fields["decay_fraction"].description
    assert "0: it drops at once after decay_steps" in description


@pytest.mark.parametrize("text", ["3e-4", "1E5", ".5e3", "-2e3", "+1e0", "3.e2"])
def test_exponents_make_floats_as_in_yaml_1_2(text):
    assert parse_yaml(text, "here") == float(text)


@pytest.mark.parametrize("text", ["1e", "e5", "3e-4x", "0x1e5z"])
def test_what_only_resembles_an_exponent_stays_text(text):
    assert parse_yaml(text, "here") == text


def test_a_config_is_frozen(load):
    config, _ = load()
    with pytest.raises(ValueError, match="frozen"):
        config.run.steps = 3
    with pytest.raises(ValueError, match="frozen"):
        config.compile = True


def test_violations_are_values():
    """Rules compare and hash them: one place, several keys."""
    from dist_llm.config.load import Violation

    assert Violation(("a.b", "c"), "wrong") == Violation(("a.b", "c"), "wrong")
    assert str(Violation(("a.b", "c"), "wrong")) == "a.b: wrong"
    with pytest.raises(dataclasses.FrozenInstanceError):
        Violation(("a",), "x").message = "y"
