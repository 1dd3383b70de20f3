"""Every option once: what is accepted, what is refused and how the refusal reads."""

import tomllib

import pytest
import tomli_w

from flexlora.aggregation import METHODS, MethodOptions
from flexlora.config.resolve import OPTIONS, Config, flatten, read_toml
from flexlora.errors import UserError
from flexlora.server.settings import ServerSettings
from paths import ROOT


def test_defaults_are_accepted_by_their_own_options():
    for key, option in OPTIONS.items():
        assert option.check(option.default) == option.default, key
        assert option.key == key and option.help
    assert dict(Config()) == {key: option.default for key, option in OPTIONS.items()}


def test_pyproject_lists_every_key_with_its_default():
    """Flower refuses an override of a key that is not in ``[tool.flwr.app.config]``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = flatten(project["tool"]["flwr"]["app"]["config"])
    defaults = {key: option.default for key, option in OPTIONS.items()}
    assert listed == defaults
    assert {k: type(v) for k, v in listed.items()} == {k: type(v) for k, v in defaults.items()}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("sed=3", "unknown key 'sed'. Did you mean 'seed'"),
        ("train.learning_rate=1", "unknown key .*Did you mean 'train.learning-rate'"),
        ("lora.rank=8", "unknown key 'lora.rank'.*--help-config"),
        ("lora=8", "unknown key 'lora'"),
        ("seed", "--set got 'seed', expected key=value"),
        ("seed=one", "seed is 'one', expected a whole number"),
        ("seed=1.5", "seed is '1.5', expected a whole number"),
        ("seed=-1", "seed is -1, expected at least 0"),
        ("num-server-rounds=0", "num-server-rounds is 0, expected at least 1"),
        ("fraction-train=1.5", "fraction-train is 1.5, expected at most 1"),
        ("fraction-train=nan", "fraction-train is nan, expected at least 0"),
        ("lora.alpha=0", "lora.alpha is 0.0, expected at least 1e-09"),
        ("lora.alpha=inf", "lora.alpha is inf"),
        ("train.learning-rate=inf", "train.learning-rate is inf"),
        ("lora.rslora=yes", "lora.rslora is 'yes', expected true or false"),
        ("train.optim=adamw", "train.optim is 'adamw'.*expected one of adamw_torch, sgd"),
        ("model.quantization=nf5", "model.quantization is 'nf5'.*Did you mean 'nf4'"),
        ("ranks.policy=", "ranks.policy is '', expected one of fixed, tiers"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(item, message):
    with pytest.raises(UserError, match=message):
        Config.resolve(sets=(item,))


@pytest.mark.parametrize(
    ("item", "value"),
    [
        ("seed=7", 7),
        ("lora.rslora=true", True),
        ("lora.rslora=False", False),
        ("lora.alpha=8", 8.0),
        ("train.learning-rate=2e-4", 2e-4),
        ("ranks.tiers=4,8,16", "4,8,16"),
        ("data.path=a=b", "a=b"),
    ],
)
def test_a_setting_arrives_in_the_type_of_its_default(item, value):
    """Trap T13: a flag of ``type=bool`` that ``false`` switches on."""
    key = item.partition("=")[0]
    got = Config.resolve(sets=(item,))[key]
    assert got == value and type(got) is type(OPTIONS[key].default)


def test_the_last_word_is_the_command_line_s(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('seed = 3\nnum-server-rounds = 2\n[lora]\nalpha = 8\n"rslora" = true\n')
    config = Config.resolve(file=file, sets=("seed=4", "seed=5"))
    assert config["seed"] == 5 and config["num-server-rounds"] == 2
    assert config["lora.alpha"] == 8.0 and config["lora.rslora"] is True
    assert config["lora.dropout"] == OPTIONS["lora.dropout"].default


def test_a_configuration_survives_toml(tmp_path):
    """The resolved configuration in the run folder is enough to repeat the run."""
    changed = Config.resolve(
        sets=("seed=9", "lora.rslora=true", "train.learning-rate=1e-5", 'data.path=C:\\x "y"')
    )
    for config in (Config(), changed):
        file = tmp_path / "config.toml"
        file.write_text(tomli_w.dumps(config.nested()), encoding="utf-8")
        back = Config.resolve(file=file)
        assert dict(back) == dict(config)
        assert [type(v) for v in back.values()] == [type(v) for v in config.values()]
    assert dict(changed) != dict(Config())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = ", "cannot be read"),
        ("sed = 1", "unknown key 'sed'. Did you mean 'seed'"),
        ("[train]\nlearning-rat = 1.0", "Did you mean 'train.learning-rate'"),
        ('seed = "1"', "seed is '1', expected a whole number"),
        ("seed = true", "seed is True, expected a whole number"),
        ("lora.rslora = 1", "lora.rslora is 1, expected true or false"),
        ("[ranks]\ntiers = [4, 8]", r"ranks.tiers is \[4, 8\], expected a text"),
        ("[seed]\nx = 1", "unknown key 'seed.x'"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path, text, message):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        Config.resolve(file=file)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"configuration file '.*none\.toml' does not exist"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(UserError, match="cannot be read"):
        read_toml(tmp_path)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        read_toml(tmp_path / "bytes.toml")


def test_replace_leaves_the_original_and_checks_too():
    config = Config()
    other = config.replace(lora__alpha=4, num_server_rounds=3, train__max_steps=1)
    assert (other["lora.alpha"], other["num-server-rounds"], other["train.max-steps"]) == (
        4.0,
        3,
        1,
    )
    assert dict(config) == dict(Config())
    with pytest.raises(UserError, match=r"unknown key 'lora\.alphas'"):
        config.replace(lora__alphas=4)
    with pytest.raises(UserError, match="seed is -1"):
        config.replace(seed=-1)


CHANGED = {
    "method.server-learning-rate": 0.5,
    "method.server-optimizer": "momentum",
    "method.server-momentum": 0.5,
    "method.server-max-rank": 7,
    "method.error-feedback": True,
    "method.carried-rank": 5,
    "method.carried-dtype": "bfloat16",
    "method.gradient-batches": 2,
    "method.energy-threshold": 0.5,
    "method.prune-factor": 0.5,
    "method.prune-penalty": 0.5,
    "method.sparse-rounds": 1,
}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_an_option_of_a_method_is_read_or_refused_and_never_ignored(method):
    """Every changed option reaches the method's options, or the sentence names who reads it."""
    names = {key: key.removeprefix("method.").replace("-", "_") for key in CHANGED}
    names["method.server-max-rank"] = "max_rank"
    assert set(names.values()) == set(MethodOptions.__dataclass_fields__)
    for key, value in CHANGED.items():
        config = Config({"method.name": method, key: value})
        if names[key] in METHODS[method].reads:
            options = ServerSettings.from_config(config).method_options
            assert getattr(options, names[key]) == value
            continue
        readers = [k for k, entry in METHODS.items() if names[key] in entry.reads]
        with pytest.raises(UserError) as refusal:
            ServerSettings.from_config(config)
        assert f"{key} is {value}, which method.name={method} does not read" in str(refusal.value)
        assert readers and all(reader in str(refusal.value) for reader in readers)
    assert ServerSettings.from_config(Config({"method.name": method})).method == method
