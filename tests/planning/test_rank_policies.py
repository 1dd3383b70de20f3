"""The policies that give each client its rank class: shares, types, tables, and measured memory."""

import math
import re
from dataclasses import replace

import pytest
import torch
from scipy.stats import norm

import flexlora
from federation import TamperingGrid, client_rows, federation, small
from flexlora.clients.worker import Worker
from flexlora.config.resolve import Config
from flexlora.config.sections import RANK_POLICIES
from flexlora.errors import UserError
from flexlora.lora.peft_folder import load_adapter
from flexlora.lora.ranks import RankClass
from flexlora.planning.memory import training_memory
from flexlora.planning.memory_ranks import memory_rank, run_plan
from flexlora.planning.model_config import read_shape
from flexlora.planning.planner import MARGIN, useful_rank
from flexlora.planning.rank_policies import MLP, PAPER_SHARES, RankPolicy, paper_types
from flexlora.planning.rank_tables import read_rank_table
from flexlora.server.members.roster import Roster
from flexlora.server.settings import check_config, rank_policy_of
from flexlora.training.slots import find_targets
from flexlora.wire.jobs import Capability
from flexlora.wire.packing import WIRE_VERSION

GIB = 2**30


def tiers(**changes):
    return RankPolicy(**{"policy": "tiers", "tiers": "4,8,16", "shares": "equal", **changes})


def ids(count):
    return [f"client_{i}" for i in range(count)]


def test_every_tier_gets_its_exact_number_of_clients():
    """Trap T4: ranks that are configured but never applied."""
    table = tiers(tiers="2,4,8,16", shares="0.5,0.25,0.15,0.1", seed=5).assign(ids(24))
    counted = [sum(c.rank == rank for c in table.values()) for rank in (2, 4, 8, 16)]
    assert counted == [12, 6, 4, 2]
    assert all(c.name == f"rank_{c.rank}" for c in table.values())


def test_the_deal_depends_on_the_set_of_ids_and_the_seed_only():
    table = tiers().assign(ids(30))
    assert tiers().assign(ids(30)[::-1]) == table
    assert tiers(seed=1).assign(ids(30)) != table


def test_one_fixed_rank_for_all():
    table = RankPolicy(policy="fixed", fixed=8).assign(["a", "b"])
    assert table == {"a": RankClass.of(8), "b": RankClass.of(8)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "fixed", "fixed": 0}, "ranks.fixed is 0, expected a rank of at least 1"),
        ({"policy": "tears"}, "ranks.policy is 'tears'.*Did you mean 'tiers'"),
        ({"policy": "paper:norml"}, "Did you mean 'paper:normal'"),
        ({"tiers": "4,4"}, "names a rank twice"),
        ({"shares": "0.5,0.1"}, "2 shares for 3 tiers"),
        ({"scale": 0.5}, "ranks.scale is 0.5, which ranks.policy=tiers does not read"),
        ({"file": "x.csv"}, "ranks.file is 'x.csv', which ranks.policy=tiers does not read"),
        ({"policy": "file"}, "ranks.file is empty"),
        ({"policy": "file", "file": "x.json"}, "expected a file that ends in .csv or .toml"),
        ({"policy": "file", "file": "none.csv"}, "ranks.file 'none.csv' does not exist"),
    ],
)
def test_policies_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        tiers(**changes)


def test_every_policy_that_can_be_configured_is_known():
    assert set(PAPER_SHARES) == {name for name in RANK_POLICIES if name.startswith("paper:")}
    for name in RANK_POLICIES:
        if name not in ("file", "memory"):
            assert len(RankPolicy(policy=name, tiers="2,4").assign(ids(8))) == 8


# The paper's distributions


def test_the_papers_types_are_those_of_its_table():
    first, second, third, fourth = paper_types()
    shapes = {"layers.0.self_attn.q_proj": (999, 999), "layers.0.mlp.up_proj": (999, 999)}
    assert list(first.ranks(shapes).values()) == [8, 8]
    assert list(second.ranks(shapes).values()) == [30, 30]
    assert list(third.ranks(shapes).values()) == [30, 200]
    assert list(fourth.ranks(shapes).values()) == [200, 200]
    assert len({kind.name for kind in paper_types()}) == 4


@pytest.mark.parametrize(
    ("policy", "counts"),
    [
        ("paper:uniform", [250, 250, 250, 250]),
        ("paper:heavy-tail-light", [800, 50, 50, 100]),
        ("paper:heavy-tail-strong", [50, 50, 100, 800]),
        ("paper:normal", [58, 442, 442, 58]),
    ],
)
def test_the_papers_shares_are_dealt_exactly(policy, counts):
    table = RankPolicy(policy=policy).assign(ids(1000)).values()
    got = [sum(c == kind for c in table) for kind in paper_types()]
    assert sum(got) == 1000 and all(abs(a - b) <= 1 for a, b in zip(got, counts, strict=True))


def test_the_normal_shares_are_the_density_that_the_public_code_takes():
    density = norm.pdf([0, 1, 2, 3], 1.5, 0.7)
    expected = density / density.sum()
    assert PAPER_SHARES["paper:normal"] == pytest.approx(expected.tolist(), rel=1e-12)


@pytest.mark.parametrize(
    ("scale", "ranks"), [(0.5, (4, 15, 100)), (0.125, (1, 4, 25)), (1e-3, (1, 1, 1))]
)
def test_scaled_ranks_are_at_least_one_and_equal_types_are_one_class(scale, ranks):
    small_, middle, third, large = paper_types(scale)
    assert (small_.rank, middle.rank, large.rank) == ranks
    assert third.largest == large.rank and third.rank == middle.rank
    assert (third == middle) == (middle == large)


NOT_MLP = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mistral": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "qwen2": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "gemma": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "phi": {"q_proj", "k_proj", "v_proj", "dense"},
    "phi3": {"qkv_proj", "o_proj"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj"},
    "gpt2": {"attn.c_attn", "attn.c_proj"},
    "gpt_neox": {"query_key_value", "attention.dense"},
}
IN_MLP = {
    "llama": {"gate_proj", "up_proj", "down_proj"},
    "mistral": {"gate_proj", "up_proj", "down_proj"},
    "qwen2": {"gate_proj", "up_proj", "down_proj"},
    "gemma": {"gate_proj", "up_proj", "down_proj"},
    "phi": {"fc1", "fc2"},
    "phi3": {"gate_up_proj", "down_proj"},
    "opt": {"fc1", "fc2"},
    "gpt2": {"mlp.c_fc", "mlp.c_proj"},
    "gpt_neox": {"dense_h_to_4h", "dense_4h_to_h"},
}


@pytest.mark.parametrize("kind", sorted(NOT_MLP))
def test_attention_and_mlp_are_told_apart_in_real_models(kind):
    """Every linear of one layer, by its real name, against a table made by hand."""
    from transformers import AutoConfig, AutoModelForCausalLM

    layers = {"gpt2": {"n_layer": 1}}.get(kind, {"num_hidden_layers": 1})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **layers))
    named = [name for name in find_targets(model, "all-linear") if re.search(r"\.0\.", name)]
    assert len(named) == len(NOT_MLP[kind]) + len(IN_MLP[kind])
    for name in named:
        ours = [leaf for leaf in IN_MLP[kind] | NOT_MLP[kind] if name.endswith(f".{leaf}")]
        assert len(ours) == 1, name
        assert bool(re.search(MLP, name)) == (ours[0] in IN_MLP[kind]), name


# A table by client

CSV = "client_id, rank, pattern, carried_rank\na,8,,\nb,16,mlp=32; q_proj=4,64\n"
TOML = "a = 8\n[b]\nrank = 16\ncarried_rank = 64\npattern = {mlp = 32, q_proj = 4}\n"


@pytest.mark.parametrize(("suffix", "text"), [("csv", CSV), ("toml", TOML)])
def test_a_table_gives_each_client_its_own_class(tmp_path, suffix, text):
    file = tmp_path / f"ranks.{suffix}"
    file.write_text(text)
    table = RankPolicy(policy="file", file=str(file)).assign(["b", "a"])
    assert table["a"] == RankClass.of(8)
    assert (table["b"].rank, table["b"].carried_rank) == (16, 64)
    shapes = {"layers.0.mlp.up": (64, 64), "layers.0.q_proj": (64, 64), "layers.0.v": (64, 64)}
    assert list(table["b"].ranks(shapes).values()) == [32, 4, 16]


def test_clients_with_the_same_ranks_are_one_class_and_others_are_not(tmp_path):
    file = tmp_path / "ranks.csv"
    rows = ["a,8,mlp=16", "b,8,mlp=16", "c,8,mlp=32", "d,8,"]
    file.write_text("\n".join(["client_id,rank,pattern", *rows]))
    table = read_rank_table(str(file))
    assert table["a"] == table["b"]
    assert len({c.name for c in table.values()}) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("client_id,rank\na,8\na,4\n", "names client 'a' twice"),
        ("client_id,rank\na,0\n", "client 'a': rank is '0', expected a whole number of at least 1"),
        ("client_id,rank\na,2.5\n", "client 'a': rank is '2.5'"),
        ("client_id,rank\na,\n", "client 'a': there is no rank"),
        ("client_id,rank,pattern\na,8,mlp=x\n", "the rank of pattern 'mlp' is 'x'"),
        ("client_id,rank,pattern\na,8,(=4\n", r"pattern '\(' is no regular expression"),
        ("client_id,rank,carried_rank\na,8,-1\n", "carried_rank is '-1'"),
        ("client_id,rank,carried\na,8,1\n", "unknown field 'carried'.*mean 'carried_rank'"),
        ("client,rank\na,8\n", "has the columns client, rank, expected client_id and rank"),
        ("client_id,rank\n", "names no client"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(tmp_path, text, message):
    file = tmp_path / "ranks.csv"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        RankPolicy(policy="file", file=str(file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 8.0\n", "client 'a': rank is 8.0"),
        ("a = true\n", "client 'a': rank is True"),
        ("a = {rank = 8, pattern = 4}\n", "pattern is 4, expected regular expressions"),
        ("a = \n", "cannot be read"),
    ],
)
def test_a_toml_table_that_makes_no_sense_is_refused(tmp_path, text, message):
    file = tmp_path / "ranks.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        RankPolicy(policy="file", file=str(file))


def test_a_table_that_is_not_about_these_clients_is_refused(tmp_path):
    file = tmp_path / "ranks.csv"
    file.write_text("client_id,rank\nsite_1,8\nsite_2,4\n")
    policy = RankPolicy(policy="file", file=str(file))
    with pytest.raises(UserError, match=r"no entry for client 'site_3'.*mean 'site_[12]'"):
        policy.assign(["site_1", "site_3"], others=None)
    with pytest.raises(UserError, match="names client 'site_2', which does not take part"):
        policy.assign(["site_1"])
    assert list(policy.assign(["site_1"], others=["site_2"])) == ["site_1"]
    assert list(policy.assign(["site_1"], others=None)) == ["site_1"]


def test_a_carried_rank_that_the_method_does_not_read_is_refused(tmp_path):
    file = tmp_path / "ranks.csv"
    file.write_text("client_id,rank,carried_rank\na,8,64\n")
    keys = {"ranks.policy": "file", "ranks.file": str(file)}
    with pytest.raises(UserError, match=r"carried_rank is 64, which method.name=flexlora does not"):
        check_config(Config.of({**keys, "method.name": "flexlora"}))
    check_config(Config.of({**keys, "method.name": "aligned"}))


# What a client's memory allows


def report(client_id="a", **values):
    honest = {
        "num_examples": 10_000,
        "version": flexlora.__version__,
        "wire_version": WIRE_VERSION,
        "fingerprint": "f",
        "quantization": "none",
        "device": "cpu (x86_64)",
        "free_bytes": GIB,
        "modules": ("m",),
        "out_features": (8,),
        "in_features": (8,),
    }
    return Capability(client_id=client_id, **{**honest, **values})


def by_memory(**changes):
    return rank_policy_of(small(ranks__policy="memory", **changes))


def room_for(policy, rank, quantization="none"):
    """The bytes that this rank takes, margin and all, from the memory model itself."""
    shape, plan = policy.memory
    own = replace(plan, rank=rank, quantization=quantization, unified_memory=True)
    return math.ceil(training_memory(shape, own).total * (1 + MARGIN))


@pytest.mark.parametrize("rank", [1, 4, 32])
def test_a_client_trains_at_the_largest_rank_that_fits(rank):
    policy = by_memory(lora__target_modules="all-linear")
    room = room_for(policy, rank)
    assert policy.from_memory(report(free_bytes=room + 1)) == RankClass.of(rank)
    smaller = policy.from_memory(report(free_bytes=room - 100))
    assert smaller == RankClass.of(rank // 2) if rank > 1 else isinstance(smaller, str)


def test_a_rank_is_no_larger_than_the_examples_support():
    policy = by_memory()
    for count, rank in ((5, 1), (45, 4), (170, 16)):
        assert policy.from_memory(report(num_examples=count)).rank == rank


def test_a_quantized_base_leaves_room_where_a_plain_one_leaves_none():
    shape, plan = run_plan(
        Config.of({"train.max-length": 32, "train.per-device-train-batch-size": 1})
    )
    small_base = training_memory(shape, replace(plan, quantization="nf4")).total
    room = {"free_bytes": math.ceil(small_base * (1 + MARGIN)) + 1}
    about = {"num_examples": 10_000, "device": "cuda (small)"}
    quantized, plain = (
        memory_rank(shape, plan, quantization=q, **room, **about) for q in ("nf4", "none")
    )
    assert quantized == RankClass.of(1) and isinstance(plain, str)


def test_clients_without_room_are_left_out_and_the_others_get_their_ranks():
    policy = by_memory()
    reports = {
        1: report("poor", free_bytes=1000),
        2: report("silent", free_bytes=0),
        3: report("rich"),
        4: report("few", num_examples=20),
    }
    roster = Roster.meet(reports, policy)
    assert {k: m.rank_class.rank for k, m in roster.members.items()} == {"rich": 256, "few": 2}
    assert re.match(
        r"1.0 kB are free, .* are needed at rank 1 on a float32 base with .*max-length=128",
        roster.left_out["poor"],
    )
    assert "did not report how much memory is free" in roster.left_out["silent"]
    with pytest.raises(UserError, match=r"no client can train.*1\.0 kB are free"):
        Roster.meet({1: reports[1]}, policy)


def test_without_a_model_whose_memory_is_known_the_policy_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UserError, match="mamba"):
        check_config(Config.of({"ranks.policy": "memory", "model.name": str(tmp_path)}))
    assert read_shape("embedded").num_layers == 4


def test_no_other_policy_measures():
    assert tiers().too_small(report(free_bytes=0)) == ""


# In a run


def test_a_run_trains_at_the_ranks_that_memory_and_examples_allow(tmp_path):
    """The reports travel, the server decides, and every update is checked against it."""
    config = small(ranks__policy="memory")
    _, run = federation(TamperingGrid(Worker(config)), config, tmp_path / "run")
    rows = client_rows(run.path, 1)
    assert [row["status"] for row in rows] == ["ok"] * 4
    ranks = [int(row["rank"]) for row in rows]
    assert ranks == [useful_rank(int(row["num_examples"])) for row in rows], "memory is no limit"
    assert len(set(ranks)) > 1


def test_a_run_trains_the_papers_types_module_by_module(tmp_path):
    config = small(
        ranks__policy="paper:uniform", ranks__scale=0.1, lora__target_modules="all-linear"
    )
    _, run = federation(TamperingGrid(Worker(config)), config, tmp_path / "run")
    names = sorted(row["rank_class"] for row in client_rows(run.path, 1))
    assert names == ["rank_1", "rank_20", "rank_3", "rank_3_mlp_20"]
    third = load_adapter(run.path / "adapters" / "rank_3_mlp_20")
    live = {name: int(factors.lora_A.any(dim=1).sum()) for name, factors in third.items()}
    assert {("mlp" in name, rank) for name, rank in live.items()} == {(False, 3), (True, 20)}
    assert {factors.rank for factors in third.values()} == {20}, "padded for every runtime"
