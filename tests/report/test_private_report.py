"""The page of a run with differential privacy: epsilon, the clip, why the run ended."""

from flexlora.report import write_report
from flexlora.report.records import read_run
from pages import read_page, written_run


def report_of(folder):
    return read_page(write_report(folder))


def test_a_private_run_shows_epsilon_and_is_finished_where_its_budget_is_spent(tmp_path):
    cause = "privacy.epsilon is 3, and epsilon 2.5 is spent; one more round would make it 3.5"
    last = {"epsilon": 2.5, "budget_spent": cause, "as_if_clients": 12000, "clip": 0.75}
    extra = {1: {"epsilon": 1.5, "clip": 0.5}, 2: last}
    private = {"privacy__mode": "central", "num_server_rounds": 9}
    folder = written_run(tmp_path / "run", (3.0, 2.0, 1.0), extra=extra, **private)
    page = report_of(folder)
    assert (
        "Epsilon" in page.said()
        and "Epsilon" not in report_of(written_run(tmp_path / "plain", (3.0, 2.0))).said()
    )
    assert 2.5 in [value for value, *_ in page.data]
    assert "of the adapters, at delta 1e-05, as if 12,000 clients" in page.said()
    assert "Clip norm" in page.said()
    assert f"Round 2 is the last: {cause}." in page.said() and read_run(folder).finished
    written = written_run(
        tmp_path / "open", (3.0, 2.0), extra={1: {"epsilon": 1.5}}, num_server_rounds=9
    )
    assert not read_run(written).finished


def test_a_run_with_noise_on_the_clients_shows_the_largest_and_the_median_epsilon(tmp_path):
    extra = {at: {"epsilon": 2.5 * at, "epsilon_median": 1.25 * at} for at in (1, 2)}
    losses, mode = (3.0, 2.0, 1.0), {"privacy__mode": "local"}
    page = report_of(written_run(tmp_path / "run", losses, extra=extra, **mode))
    assert "the largest of a client's (median 2.5), at delta 1e-05" in page.said()
    assert "median of the clients" in page.said()


def test_columns_that_a_secure_sum_left_out_are_no_silent_success(tmp_path):
    note = "columns 3 to 8 left out: fewer than privacy.min-group=3 clients have them (1)"
    extra = {1: {"left_out": ""}, 2: {"left_out": note}}
    page = report_of(written_run(tmp_path / "run", (3.0, 2.0, 1.0), extra=extra))
    assert note in page.said() and "columns left out" in page.said()
    assert not any("None: every client" in words for words in page.said())
