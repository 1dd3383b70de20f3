"""What a client says that it can do is what it has done, once per process."""

import time

import pytest
import torch
from flwr.app import Message, RecordDict

from federation import TamperingGrid, client_rows, federation, small
from flexlora.clients import worker as worker_module
from flexlora.clients.messages import encode_capability
from flexlora.clients.worker import Worker
from flexlora.commands.cli import main
from flexlora.errors import UserError
from flexlora.planning import probing
from flexlora.server.transport.messages import decode_capability

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh():
    """No test sees what another's kernels did."""
    probing.probe.cache_clear()
    yield
    probing.probe.cache_clear()


def test_all_kernels_run_here_in_well_under_a_second():
    import bitsandbytes  # noqa: F401  (its import is not the kernels' time)

    began = time.process_time()
    found = probing.probe(CPU)
    assert time.process_time() - began < 1.0
    assert found.runs == ("bf16", "nf4", "8bit", "adamw_8bit") and found.absent == ()
    assert found.error("nf4") == ""


def dies(device):
    raise RuntimeError("no kernel image is available\nfor execution on the device")


def test_a_library_that_dies_at_its_first_kernel_is_absent_with_its_error(monkeypatch):
    import bitsandbytes.nn as library

    def forward(self, x):
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(library.Linear4bit, "forward", forward)
    found = probing.probe(CPU)
    assert found.runs == ("bf16", "8bit", "adamw_8bit")
    assert found.absent == ("nf4: RuntimeError: CUDA error: no kernel image is available",)


def test_a_kernel_that_returns_nonsense_is_absent_too(monkeypatch):
    import bitsandbytes.nn as library

    honest = library.Linear8bitLt.forward
    monkeypatch.setattr(library.Linear8bitLt, "forward", lambda self, x: 2 * honest(self, x))
    error = probing.probe(CPU).error("8bit")
    assert error.startswith("ArithmeticError: the product is off by 1")


def test_a_gradient_that_is_not_the_kernels_own_is_seen(monkeypatch):
    """bitsandbytes' repacked CPU weights once had no gradient at all, and a right forward pass."""
    import bitsandbytes.nn as library

    honest = library.Linear4bit.forward
    monkeypatch.setattr(
        library.Linear4bit, "forward", lambda self, x: honest(self, x).detach() + 0 * x
    )
    assert "the gradient is off by" in probing.probe(CPU).error("nf4")


def test_an_optimizer_that_dies_at_its_first_step_is_absent_with_its_error(monkeypatch):
    import bitsandbytes.functional as library

    def step(*arguments, **options):
        raise RuntimeError("CUDA error: invalid device function")

    monkeypatch.setattr(library, "optimizer_update_8bit_blockwise", step)
    found = probing.probe(CPU)
    assert found.runs == ("bf16", "nf4", "8bit")
    assert found.error("adamw_8bit") == "RuntimeError: CUDA error: invalid device function"


def test_an_optimizer_that_steps_the_wrong_way_is_absent_too(monkeypatch):
    import bitsandbytes.functional as library

    honest = library.optimizer_update_8bit_blockwise

    def step(name, gradients, *rest, **options):
        honest(name, -gradients, *rest, **options)

    monkeypatch.setattr(library, "optimizer_update_8bit_blockwise", step)
    assert "the change is off by 2" in probing.probe(CPU).error("adamw_8bit")


def test_kernels_run_once_however_many_clients_a_process_simulates(monkeypatch):
    runs = []
    monkeypatch.setitem(probing.KERNELS, "bf16", runs.append)
    worker = Worker(small(engine__device="cpu"))
    reports = [worker.capability(client_id) for client_id in worker.client_ids]
    assert len(reports) == 4 and runs == [CPU]
    assert all(report.runs == ("bf16", "nf4", "8bit", "adamw_8bit") for report in reports)
    assert len({report.free_bytes for report in reports}) == 1
    assert 2**20 < reports[0].free_bytes < 2**50


def test_in_simulation_no_kernel_is_run_for_clients_that_are_elsewhere(monkeypatch):
    monkeypatch.setattr(worker_module, "probe", lambda device: pytest.fail("probed"))
    grid = TamperingGrid(Worker(small(engine__device="cpu")))
    query = Message(RecordDict(), dst_node_id=1, message_type="query")
    (reply,) = grid.send_and_receive([query])
    printed = decode_capability(reply)
    assert (printed.runs, printed.absent, printed.cause) == (
        (),
        (),
        "",
    ) and printed.num_examples > 0


def test_what_was_run_travels_with_the_report(monkeypatch):
    monkeypatch.setitem(probing.KERNELS, "nf4", dies)
    worker = Worker(small(engine__device="cpu"))
    capability = worker.capability("client_00")
    TamperingGrid(worker)  # Flower's messages know whose process they are made in
    sent = Message(RecordDict(), dst_node_id=1, message_type="query")
    back = decode_capability(Message(encode_capability(capability), reply_to=sent))
    assert back == capability and back.runs == ("bf16", "8bit", "adamw_8bit")
    assert back.absent == ("nf4: RuntimeError: no kernel image is available",)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model__quantization": "nf4"}, "model.quantization"),
        ({"clients__quantization": "nf4:0.5"}, "clients.quantization"),
    ],
)
def test_a_base_that_cannot_run_here_is_refused_before_it_is_loaded(monkeypatch, changes, key):
    monkeypatch.setitem(probing.KERNELS, "nf4", dies)
    message = f"{key} is 'nf4', which bitsandbytes cannot run on this machine's cpu: RuntimeError"
    with pytest.raises(UserError, match=message):
        Worker(small(engine__device="cpu", **changes))
    Worker(small(engine__device="cpu", model__quantization="8bit"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train__optim": "paged_adamw_8bit"},
            "train.optim is 'paged_adamw_8bit', whose moments lie in CUDA's managed memory, "
            "but training runs on the cpu; use 'adamw_8bit'",
        ),
        (
            {"train__optim": "adamw_8bit"},
            "train.optim is 'adamw_8bit', which bitsandbytes cannot run on this machine's cpu: "
            "RuntimeError: no kernel image is available; use 'adamw_torch'",
        ),
        (
            {"train__optim": "adamw_8bit", "wire__dtype": "float64"},
            "steps float32 factors, but these are float64; use 'adamw_torch', or wire.dtype=flo",
        ),
    ],
)
def test_an_optimizer_that_cannot_run_here_is_refused_before_a_base_is_loaded(
    monkeypatch, changes, message
):
    monkeypatch.setitem(probing.KERNELS, "adamw_8bit", dies)
    monkeypatch.setattr(worker_module, "load_base", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match=message):
        Worker(small(engine__device="cpu", **changes))


def test_a_run_with_paged_moments_on_a_cpu_is_one_sentence(tmp_path, capsys):
    chosen = ["--set", "train.optim=paged_adamw_8bit", "--set", "engine.device=cpu"]
    assert main(["simulate", *chosen, "--out", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr().err
    assert (
        printed.startswith("flexlora: train.optim is 'paged_adamw_8bit'")
        and printed.count("\n") == 1
    )
    assert not (tmp_path / "run").exists()


def test_a_client_without_the_kernels_still_trains_on_a_plain_base(monkeypatch, tmp_path):
    for name in ("nf4", "8bit", "adamw_8bit"):
        monkeypatch.setitem(probing.KERNELS, name, dies)
    _, run = federation(TamperingGrid(Worker(small())), small(), tmp_path / "run")
    assert [row["status"] for row in client_rows(run.path, 1)] == ["ok"] * 4
