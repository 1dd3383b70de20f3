"""What the resident trainer refuses, who may open its socket, and a trainer that is not there."""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from flwr.app import Message

import flexlora
from flexlora.clients import handler
from flexlora.clients.trainer import client
from flexlora.clients.trainer.client import call_of, health, questions, trainer_on
from flexlora.clients.trainer.service import Limits, listen
from flexlora.clients.trainer.sockets import DEAD, connection_error
from flexlora.clients.trainer.trainer_pb2 import Question
from flexlora.errors import UserError
from flexlora.server.transport.messages import (
    decode_capability,
    decode_eval_result,
    decode_train_result,
    transient_cause,
)
from flexlora.wire.jobs import Capability, EvalResult, TrainResult
from packed import as_array, trained
from trainers import (
    asked,
    cause_of,
    context_of,
    evaluate_message,
    query_message,
    resident,
    run_config,
    train_message,
    write_rows,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "data")


@pytest.fixture(scope="module")
def trainer(data, tmp_path_factory):
    with resident(data, tmp_path_factory.mktemp("kept")) as made:
        yield made


def _forbidden(config):
    raise AssertionError("nothing may be loaded here")


REFUSED = {
    "another base": ({"fingerprint": "0" * 32}, {}, {}, r"the base 0{32}, the trainer holds \w"),
    "another name": ({}, {}, {"client_id": "zoe"}, "'zoe' and the trainer was started .*'site'"),
    "unknown key": ({}, {"train.stepz": 1}, {}, "unknown key 'train.stepz'.*train.max-steps"),
    "bad value": ({}, {"train.max-steps": -1}, {}, "train.max-steps is -1, expected at least 0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_this_node_is_refused_with_a_sentence(data, tmp_path, what):
    job, settings, node, words = REFUSED[what]
    config = run_config()
    with resident(data, tmp_path / "kept", client_id="site") as made:
        message = train_message(config, **job)
        reply = made.ask(message, {**config.flat(), **settings}, **node)
        assert not trained(reply) and made.trainer.totals.trained == 0
    assert re.search(words, cause_of(reply)), cause_of(reply)


def test_another_version_is_refused_with_both_named(trainer, monkeypatch):
    call = call_of(query_message(), trainer.context(run_config()))
    call.version = "9.9.9"
    with pytest.raises(UserError, match=f"FlexLoRA 9.9.9, the trainer is {flexlora.__version__}"):
        send(trainer, "Capability", [Question(call=call)])


def test_the_base_of_a_job_is_checked_without_a_trainer_too(data):
    config = run_config()
    message = train_message(config, fingerprint="0" * 32)
    reply = asked(message, context_of(config, data_path=str(data)))
    assert f"for the base {'0' * 32}, this node holds" in cause_of(reply)


def send(made, method, parts):
    """All answers to a request that no ClientApp would make."""
    with trainer_on(made.path) as stub:
        return list(getattr(stub, method)(iter(parts)))


def test_too_large_a_request_is_refused_by_the_size_it_announces(data, tmp_path):
    config = run_config()
    with resident(data, tmp_path / "kept", limits=Limits(request_bytes=10_000)) as made:
        reply = made.ask(train_message(config), config)
        assert "bytes, expected 10,000 at most" in cause_of(reply)
        assert made.ask(query_message(), config)["capability"]["cause"] == ""
        assert made.trainer.totals.trained == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda parts: parts[1:], "begins with a call"),
        (lambda parts: [], "begins with a call"),
        (lambda parts: parts[:-1], "bytes end before the last array"),
        (lambda parts: [*parts, Question(data=b"x")], "more bytes than the arrays take"),
        (lambda parts: [parts[0], parts[0]], "a second call came"),
        (lambda parts: [parts[0], _changed(parts[1]), *parts[2:]], "not those of the digest"),
        (lambda parts: [parts[0], Question(data=bytes(2**20 + 1))], "a part has 1048577 bytes"),
    ],
)
def test_bytes_that_are_not_the_calls_are_refused(trainer, change, words):
    config = run_config(seed=5)
    message = train_message(config)
    as_array(message.content)
    call = call_of(message, trainer.context(config))
    before = trainer.trainer.totals.trained
    with pytest.raises(UserError, match=words):
        send(trainer, "Train", change(list(questions(call, message.content))))
    assert trainer.trainer.totals.trained == before


def _changed(part):
    return Question(data=bytes([part.data[0] ^ 1]) + part.data[1:])


def test_a_silent_caller_does_not_hold_the_turn(data, tmp_path):
    config = run_config()
    message = train_message(config)
    limits = Limits(stall_seconds=0.3, wait_seconds=20.0)
    with resident(data, tmp_path / "kept", limits=limits) as made:
        call, never = call_of(message, made.context(config)), threading.Event()

        def silent():
            yield Question(call=call)
            never.wait(20)

        with pytest.raises(UserError, match="broke off a request whose bytes did not come"):
            send(made, "Train", silent())
        never.set()
        assert made.ask(train_message(config), config)["report"]["cause"] == ""


def test_the_socket_is_this_users_alone(trainer):
    found = trainer.path.stat()
    assert stat.S_ISSOCK(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o600


def test_the_socket_can_be_opened_to_a_group(data, tmp_path):
    with resident(data, tmp_path / "kept", group=str(os.getegid())) as made:
        found = made.path.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, os.getegid())
        assert health(made.path).version == flexlora.__version__


def test_a_live_socket_is_refused_and_lives_on(data, tmp_path, trainer):
    with pytest.raises(UserError, match="a trainer listens on"):
        listen(trainer.service, trainer.path)
    assert health(trainer.path).doing == ""


def test_a_stale_socket_is_replaced(trainer):
    path = trainer.path.with_name("stale")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    assert path.exists() and connection_error(path) == DEAD
    server = listen(trainer.service, path)
    server.start()
    assert health(path).fingerprint == trainer.trainer.fingerprint
    server.stop(0).wait()


@pytest.fixture
def impatient(monkeypatch):
    """A trainer that is not there is not waited for."""
    monkeypatch.setattr(client, "PATIENCE_SECONDS", dict.fromkeys(client.PATIENCE_SECONDS, 0.0))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
def test_a_trainer_that_is_not_there_is_a_cause_and_no_fallback(tmp_path, monkeypatch, kind):
    config = run_config()
    message = {
        "query": query_message,
        "train": lambda: train_message(config),
        "evaluate": lambda: evaluate_message(config),
    }[kind]()
    monkeypatch.setattr(handler, "worker_for", _forbidden)
    gone = tmp_path / "gone.sock"
    node = {"trainer_socket": str(gone), "data_path": str(tmp_path), "client_id": "site"}
    content = asked(message, context_of(config, **node))
    cause = cause_of(content)
    assert f"'{gone}' cannot be reached: there is no such socket" in cause and "\n" not in cause
    reply = Message(content, reply_to=message)
    assert transient_cause(reply) == cause[:300]
    decode, failed = {
        "query": (decode_capability, Capability.failed("site", cause)),
        "train": (decode_train_result, replace(TrainResult.failed("site", cause), transient=True)),
        "evaluate": (decode_eval_result, EvalResult(client_id="site", cause=cause)),
    }[kind]
    assert repr(decode(reply)) == repr(failed)


def test_a_trainer_that_comes_back_in_time_is_asked(trainer, monkeypatch):
    """Its socket is away when the question comes, and there again two looks later."""
    looks = iter(["there is no such socket"] * 2)
    monkeypatch.setattr(client, "connection_error", lambda path: next(looks, ""))
    monkeypatch.setattr(client, "PAUSE_SECONDS", 0.0)
    config = run_config()
    assert cause_of(asked(query_message(), trainer.context(config))) == ""
    assert next(looks, None) is None


@pytest.mark.usefixtures("impatient")
def test_the_environment_names_the_trainer_of_a_real_node_only(trainer, data, monkeypatch):
    config = run_config()
    monkeypatch.setenv("FLEXLORA_TRAINER_SOCKET", str(trainer.path) + ".gone")
    real, simulated = context_of(config), context_of(config, partition_id=0)
    assert "cannot be reached" in cause_of(asked(query_message(), real))
    assert cause_of(asked(query_message(), simulated)) == ""
    named = trainer.context(config)  # the node config is heard first
    assert cause_of(asked(query_message(), named)) == ""


def test_a_relative_socket_is_refused():
    reply = asked(query_message(), context_of(run_config(), trainer_socket="here.sock"))
    assert "trainer-socket is 'here.sock', expected an absolute path" in cause_of(reply)


CHILD = """
import sys
from flexlora.clients.app import app
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 0
query = Message(RecordDict(), dst_node_id=5, message_type="query")
node = {"trainer-socket": sys.argv[1], "client-id": "site"}
context = Context(run_id=7, node_id=5, node_config=node, state=RecordDict(), run_config={})
reply = app(query, context).content["capability"]
print(reply["cause"] or "fine", "torch" in sys.modules, "transformers" in sys.modules)
"""


def test_a_clientapp_with_a_trainer_loads_no_torch(trainer, tmp_path):
    """Whether it is answered or not."""
    for path, start in ((trainer.path, "fine"), (tmp_path / "gone", "the trainer on")):
        run = subprocess.run(
            [sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, timeout=300
        )
        assert run.stdout.startswith(start) and run.stdout.endswith("False False\n"), run
