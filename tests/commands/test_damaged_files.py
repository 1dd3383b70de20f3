"""Every reader of a file from outside ends in its own refusal, whatever the file holds.

One line a reader: what it reads, of a sound file, and the error that it may raise. Files whose
damage counts as their absence (``live.json``, ``environment.json``, replies) may raise none.
"""

import json
import shutil

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from builders import random_adapter, tiny_config
from damage import check_reader
from federation import small
from flexlora.clients.setup.node_key_checks import read_key
from flexlora.config.resolve import Config, read_toml
from flexlora.deploy.certificates import AuthoritiesRefused, make_authority, read_authorities
from flexlora.deploy.connections import Stopped
from flexlora.errors import UserError
from flexlora.planning.model_config import read_shape
from flexlora.planning.rank_tables import read_rank_table
from flexlora.report.page import run_page
from flexlora.report.records import read_run
from flexlora.runs.folder import RunFolder
from flexlora.runs.live_state import read_live
from flexlora.simulations.experiments.results import ResultsFile
from flexlora.simulations.experiments.seed_series import SeedSeries
from flexlora.simulations.simulate import simulate
from flexlora.simulations.world.traces import read_trace
from flexlora.training.personal_store import PersonalStore, StoredFactors

RANKS_CSV = "client_id,rank,pattern,carried_rank\na,4,q_proj=2;up=8,16\nb,8,,\n"
RANKS_TOML = 'a = 4\n[b]\nrank = 8\ncarried_rank = 16\n[b.pattern]\n"q_proj" = 2\n'
TRACE = "client_id,start_seconds,end_seconds\na,0,10.5\na,20,30\nb,5,6\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "run"
    simulate(small(), folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A run folder to damage."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize(("name", "text"), [("r.csv", RANKS_CSV), ("r.toml", RANKS_TOML)])
def test_a_table_of_ranks(tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text)
    assert check_reader(file, lambda: read_rank_table(str(file)), count=600) > 50


def test_a_trace_of_availability(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text(TRACE)
    assert check_reader(file, lambda: read_trace(str(file)), count=600) > 50


def test_a_configuration_file(run):
    file = run / "config.toml"
    assert check_reader(file, lambda: Config.of(read_toml(file)), count=200) > 50
    assert check_reader(file, lambda: RunFolder.open(run), count=100, seed=1) > 25


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", "clients.csv", "evaluation.csv"])
def test_what_a_report_reads_of_a_run(run, name):
    check_reader(run / name, lambda: run_page(read_run(run)), count=40)


@pytest.mark.parametrize("name", ["environment.json", "checkpoint/current.json"])
def test_the_json_that_a_report_reads_of_a_run(run, name):
    check_reader(run / name, lambda: read_run(run), count=300)


def test_the_index_of_a_checkpoint(run):
    folder = RunFolder(run)

    def read():
        folder.load_checkpoint()
        folder.load_notes()

    assert check_reader(run / "checkpoint" / "current.json", read, count=400) > 200


def test_the_tensors_of_a_checkpoint(run):
    *_, file = sorted((run / "checkpoint").glob("*.safetensors"))  # the newest of the history
    assert check_reader(file, RunFolder(run).load_checkpoint, count=40) >= 35


@pytest.mark.parametrize("name", ["metrics.jsonl", "clients.csv"])
def test_what_a_resume_cuts_back(run, name):
    def rewind():
        copies = {file: (run / file).read_bytes() for file in ("metrics.jsonl", "clients.csv")}
        try:
            RunFolder(run).rewind(0)
        finally:
            for file, data in copies.items():
                (run / file).write_bytes(data)

    check_reader(run / name, rewind, count=150)


def test_live_state_that_is_damaged_is_none(run):
    check_reader(run / "live.json", lambda: read_live(run), count=300, refusal=())


def test_personal_factors(tmp_path):
    adapter = random_adapter({"attn.q": (6, 4)}, 2, dtype=torch.float32)
    store = PersonalStore(tmp_path)
    stored = StoredFactors(client_id="a", server_round=1, rank_class="rank_2", adapter=adapter)
    store.put(stored)
    (file,) = tmp_path.rglob("*.safetensors")
    assert check_reader(file, lambda: store.before("a", 2), count=400) > 100


def test_root_certificates(tmp_path):
    file = tmp_path / "ca.crt"
    file.write_bytes(make_authority("a", days=3).certificate_pem)
    check_reader(file, lambda: read_authorities(file), count=200, refusal=AuthoritiesRefused)


def test_a_node_s_key(tmp_path):
    key = ec.generate_private_key(ec.SECP384R1())
    kinds = (Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    file = tmp_path / "node-key"
    file.write_bytes(key.private_bytes(*kinds))
    assert check_reader(file, lambda: read_key(file), count=300, refusal=Stopped) > 100


def test_the_configuration_of_a_model_to_plan_for(tmp_path):
    file = tmp_path / "config.json"
    config = tiny_config("llama").to_dict() | {"architectures": ["LlamaForCausalLM"]}
    file.write_text(json.dumps(config, default=str))
    assert check_reader(file, lambda: read_shape(str(tmp_path)), count=400) > 20


def test_the_results_of_an_experiment(tmp_path):
    file = tmp_path / "results.json"
    saved = {"experiment": "x", "set": {"a": 1}, "scale": 1.0, "rows": [{"b": 2}], "trials": {}}
    file.write_text(json.dumps(saved))
    check_reader(file, lambda: ResultsFile.read(file, "x", {"a": 1}), count=300)


def test_a_series_of_seeds(tmp_path):
    file = tmp_path / "seeds.json"
    rows = [{"seed": 0, "scores": {"loss": 1.0}}]
    file.write_text(json.dumps({"config": {}, "first_seed": 0, "seeds": 1, "rows": rows}))
    check_reader(file, lambda: SeedSeries.read(tmp_path), count=300)


def test_the_check_sees_a_reader_that_leaks(tmp_path):
    file = tmp_path / "x.json"
    file.write_text('{"a": [1, 2]}')
    with pytest.raises(AssertionError, match=r"escaped.*JSONDecodeError"):
        check_reader(file, lambda: json.loads(file.read_bytes()))
    with pytest.raises(AssertionError, match="escaped"):
        check_reader(file, lambda: read_json(file))


def read_json(file):
    """Refuses what is no JSON, and trusts the rest."""
    try:
        return json.loads(file.read_bytes())["a"][0]
    except ValueError:
        raise UserError("no JSON") from None
