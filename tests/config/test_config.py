"""Every option once: what is accepted, what is refused and how the refusal reads."""

import subprocess
import sys
import tomllib

import pytest
import tomli_w

from flexlora.aggregation import METHODS, make_method, method_class
from flexlora.config.resolve import (
    KEYS,
    RETIRED,
    Config,
    all_keys,
    flatten,
    flower_table,
    of_flower,
    of_older,
    read_toml,
)
from flexlora.errors import UserError
from flexlora.planning.planner import Request
from flexlora.server.settings import check_config
from flexlora.server.strategy import FlexLoRAStrategy
from flexlora.server.transport.exchange import retry_policy
from flexlora.training.schedule import TrainSettings
from paths import ROOT


def test_defaults_are_accepted_and_every_key_has_a_line_of_help():
    assert all(info.description for info in all_keys().values())
    assert Config.of(Config().flat()) == Config() == Config.resolve()
    for name in METHODS:
        check_config(Config.of({"method.name": name}))
    assert {key for key in Config().flat() if not key.startswith("method.")} < KEYS.keys()


def test_pyproject_lists_every_key_of_every_method():
    """Flower refuses an override of a key that is not in ``[tool.flwr.app.config]``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["tool"]["flwr"]["app"]["config"]
    assert listed == flower_table() and flatten(listed).keys() == all_keys().keys()
    for key, value in flatten(listed).items():
        assert type(value) is (type(KEYS[key].default) if key in KEYS else str), key
    assert Config.of(of_flower(flatten(listed))) == Config()
    asked = {**flatten(listed), "method.name": "hetlora", "method.prune-factor": 0.5}
    assert Config.of(of_flower(asked)).method.prune_factor == 0.5


# Each of the six below had another default in the library than at the command line.
def test_the_library_carries_the_rank_of_the_command_line():
    assert make_method("carried").options.carried_rank == Config().method.carried_rank == 32
    assert Request(memory_bytes=1).carried_rank == 32


def test_the_library_trains_at_the_rate_of_the_command_line():
    assert TrainSettings().learning_rate == Config().train.learning_rate == 5e-3


def test_the_library_trains_the_steps_of_the_command_line():
    assert TrainSettings().max_steps == Config().train.max_steps == 20


def test_the_library_sends_lost_messages_again_as_the_command_line_does():
    strategy = FlexLoRAStrategy(Config())
    assert retry_policy(object(), strategy.config, timeout=10.0).resends == 2


def test_the_library_spares_clients_that_fail_as_the_command_line_does():
    assert FlexLoRAStrategy(Config()).selector.config.server.backoff_rounds == 8


def test_the_library_prunes_as_the_command_line_does():
    asked = Config.of({"method.name": "hetlora"})
    assert make_method("hetlora").local.prune_factor == asked.method.prune_factor == 0.75


@pytest.mark.parametrize(
    "code",
    [
        "import flexlora, flexlora.config.resolve",
        "import flexlora.commands.plan, flexlora.report, flexlora.report.watch",
        "from flexlora.commands.cli import main; main(['--help'])",
        "from flexlora.commands.cli import main; main(['plan', '--model', 'embedded'])",
    ],
)
def test_neither_torch_nor_flower_is_loaded(code):
    checked = f"""
import sys
try:
    {code}
except SystemExit:
    pass
assert not {{"torch", "flwr"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", checked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
        ("fraction-train=nan", "fraction-train is nan, expected a finite number"),
        ("lora.alpha=0", "lora.alpha is 0.0, expected at least 1e-09"),
        ("lora.alpha=inf", "lora.alpha is inf"),
        ("train.learning-rate=inf", "train.learning-rate is inf"),
        ("lora.rslora=yes", "lora.rslora is 'yes', expected true or false"),
        ("train.optim=adamw", "train.optim is 'adamw'.*expected one of adamw_torch, sgd"),
        ("model.quantization=nf5", "model.quantization is 'nf5'.*Did you mean 'nf4'"),
        ("ranks.policy=", "ranks.policy is '', expected one of fixed, tiers"),
        ("method.carried-rank=", "method.carried-rank is '', expected a whole number"),
        ("method.server-learning-rate=-1", "rate is -1.0, expected at least 0"),
        ("carried-rank=3", "unknown key 'carried-rank'. Did you mean 'method.carried-rank'"),
        ("method.realign=true", "unknown key 'method.realign'"),
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
        ("method.carried-rank=4", 4),
        ("method.error-feedback=true", True),
    ],
)
def test_a_setting_arrives_in_the_type_of_its_default(item, value):
    """Trap T13: a flag of ``type=bool`` that ``false`` switches on."""
    key = item.partition("=")[0]
    got = Config.resolve(sets=(item,)).flat()[key]
    assert got == value and type(got) is type(all_keys()[key].default)


def test_the_last_word_is_the_command_line_s(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('seed = 3\nnum-server-rounds = 2\n[lora]\nalpha = 8\n"rslora" = true\n')
    config = Config.resolve(file=file, sets=("seed=4", "seed=5"))
    assert config.seed == 5 and config.num_server_rounds == 2
    assert config.lora.alpha == 8.0 and config.lora.rslora is True
    assert config.lora.dropout == KEYS["lora.dropout"].default


def test_a_configuration_survives_toml(tmp_path):
    """The resolved configuration in the run folder is enough to repeat the run."""
    changed = Config.resolve(
        sets=("seed=9", "lora.rslora=true", "train.learning-rate=1e-5", 'data.path=C:\\x "y"')
    )
    hetlora = Config.of({"method.name": "hetlora", "method.prune-penalty": 0.5})
    for config in (Config(), changed, hetlora):
        file = tmp_path / "config.toml"
        file.write_text(tomli_w.dumps(config.nested()), encoding="utf-8")
        back = Config.resolve(file=file)
        assert back == config and hash(back) == hash(config)
        assert Config.of(config.changed()) == config
    assert changed.changed().keys() == {"seed", "lora.rslora", "train.learning-rate", "data.path"}


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
        ("[ranks]\npolicy = 3", r"ranks.policy is 3, expected one of fixed, tiers"),
        ("[seed]\nx = 1", "unknown key 'seed.x'"),
        ("[method]\nname = 3", r"method '3' is unknown"),
        ("[method]\nname = 'fedavg'", r"method 'fedavg' is unknown"),
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


def test_other_values_leave_the_original_and_are_checked_too():
    config = Config()
    other = config.with_values({"lora.alpha": 4, "num-server-rounds": 3, "train.max-steps": 1})
    assert (other.lora.alpha, other.num_server_rounds, other.train.max_steps) == (4.0, 3, 1)
    assert config == Config()
    with pytest.raises(UserError, match=r"unknown key 'lora\.alphas'"):
        config.with_values({"lora.alphas": 4})
    with pytest.raises(UserError, match="seed is -1"):
        config.with_values({"seed": -1})
    fewer = config.with_values({"method.carried-rank": 3})
    assert fewer.with_values({"seed": 1}).method.carried_rank == 3
    assert fewer.with_values({"method.name": "aligned"}).method.carried_rank == 32


@pytest.mark.parametrize("method", sorted(METHODS))
def test_an_option_that_the_method_lacks_is_refused_with_those_that_have_it(method):
    own = method_class(method).Options.option_names()
    for key, info in all_keys().items():
        leaf = key.removeprefix("method.")
        if leaf == key or leaf in own:
            continue
        with pytest.raises(UserError) as refusal:
            Config.of({"method.name": method, key: info.default})
        having = [name for name in METHODS if leaf in method_class(name).Options.option_names()]
        assert f"{key} is {info.default}, which method.name={method} does" in str(refusal.value)
        assert having and ", ".join(having) in str(refusal.value)


def test_an_older_run_s_configuration_is_read_where_its_deleted_keys_say_nothing():
    """Older versions wrote the options of every method into ``config.toml``."""
    older = {f"method.{key}": info.default for key, info in _options().items()}
    older |= RETIRED | {"seed": 3, "method.name": "flexlora"}
    assert Config.of(of_older(older)) == Config.of({"seed": 3, "method.name": "flexlora"})
    for key, value in (("method.restarts", 2), ("method.prune-factor", 0.5)):
        with pytest.raises(UserError, match=key):
            Config.of(of_older({**older, key: value}))


def _options():
    found = {
        key.removeprefix("method."): info for key, info in all_keys().items() if "method." in key
    }
    return {key: info for key, info in found.items() if key != "name"}
