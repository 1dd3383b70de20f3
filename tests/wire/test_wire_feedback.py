"""What rounding takes from an upload comes with the next: sums that do not drift, and where not."""

from dataclasses import replace

import pytest
import torch

import reference_wire
from builders import random_adapter, train_job
from flexlora.aggregation import METHODS
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.training.personal_store import PersonalStore
from flexlora.training.uplink import Uplink
from flexlora.wire.encoding import FACTORS, over_the_wire
from flexlora.wire.feedback import check_wire, compensated, feedback_space, lost
from flexlora.wire.jobs import TrainResult
from one_round import SHAPES, OneRound, distance, next_state, noisy
from spelled import of_names

SPACES = {name: feedback_space(name) for name in METHODS if feedback_space(name)}

WIDE = {"attn.q": (24, 16), "mlp.up": (16, 20)}  # four times rank 4 hold all that is lost here


def dense(adapter):
    """``s B A`` of every module in float64."""
    return {n: f.scaling * f.lora_B.double() @ f.lora_A.double() for n, f in adapter.items()}


def size(matrices):
    return sum(float(matrix.square().sum()) for matrix in matrices.values()) ** 0.5


def minus(first, second):
    return {name: first[name] - second[name] for name in first}


def plus(first, second):
    return {name: first[name] + second[name] for name in first}


def start_of(rank=4, seed=0):
    """What clients begin with, as it arrives over an int8 wire."""
    return over_the_wire(random_adapter(WIDE, rank, seed=seed, dtype=torch.float32), "int8")


def uploads(trained, space, *, held, labels=FACTORS, feedback=True):
    """What a server decodes of these, and the error that the client has after each."""
    error, decoded, errors = None, [], []
    for adapter in trained:
        sent = compensated(adapter, error, space, labels) if feedback else adapter
        decoded.append(over_the_wire(sent, "int8", labels, held))
        if feedback:
            error = lost(adapter, error, decoded[-1], space, labels)
        errors.append(error)
    return decoded, errors


def gaps(trained, decoded):
    """``|sum of what was trained - sum of what was decoded|`` after each round."""
    total, sizes = {name: torch.zeros(shape) for name, shape in WIDE.items()}, []
    for one, other in zip(trained, decoded, strict=True):
        total = plus(total, minus(dense(one), dense(other)))
        sizes.append(size(total))
    return sizes


def rounds_of(kind, labels=FACTORS, count=48):
    """The start that the server holds, and what is trained from it, round after round.

    ``same`` is one update again and again, whose rounding adds up fastest.
    """
    held = start_of()
    seeds = [7] * count if kind == "same" else range(count)
    return held, [noisy(held, labels, seed, size=0.05) for seed in seeds]


@pytest.mark.parametrize("kind", ["same", "new"])
@pytest.mark.parametrize(
    ("space", "labels"),
    [("products", FACTORS), ("factors", ("lora_B",)), ("factors", ("lora_A",))],
)
def test_the_sum_of_what_is_decoded_is_that_of_what_was_trained_up_to_one_error(
    kind, space, labels
):
    held, trained = rounds_of(kind, labels)
    one_round = gaps(trained[:1], uploads(trained[:1], space, held=held, labels=labels)[0])[0]
    decoded, errors = uploads(trained, space, held=held, labels=labels)
    with_feedback = gaps(trained, decoded)
    without = gaps(trained, uploads(trained, space, held=held, labels=labels, feedback=False)[0])
    assert 0 < max(with_feedback) < 3 * one_round
    assert max(with_feedback[24:]) < 1.5 * max(with_feedback[:24]), "it grows"
    growth = {"same": 40.0, "new": 4.0}[kind]
    assert without[-1] > growth * one_round, "the control: without feedback it does grow"
    if space == "products":
        assert size(dense(errors[-1])) == pytest.approx(with_feedback[-1], rel=1e-4)


def test_feedback_in_products_is_the_one_that_is_defined():
    """Dense matrices, LAPACK's SVD: the same sums, up to the basis in which one rounds."""
    _, trained = rounds_of("new", count=12)
    decoded, _ = uploads(trained, "products", held=None)
    for name in WIDE:
        changes = [dense(adapter)[name].numpy() for adapter in trained]
        sent, errors = reference_wire.feedback(
            changes, lambda matrix: reference_wire.rounded_best(matrix, 4)
        )
        ours = sum(dense(adapter)[name] for adapter in decoded).numpy()
        last = float(abs(errors[-1]).max())
        assert abs(ours - sum(sent)).max() < 4 * last < 0.2 * abs(sum(sent)).max()


def test_what_is_sent_is_the_best_product_of_its_rank_near_what_was_trained():
    held, (first, second) = rounds_of("new", count=2)
    error = lost(first, None, over_the_wire(first, "int8", held=held), "products")
    sent = compensated(second, error, "products")
    for name, factors in sent.items():
        wanted = dense(second)[name] + dense(error)[name]
        left, right = reference_wire.best(wanted.numpy(), 4)
        assert float((dense(sent)[name] - torch.from_numpy(left @ right)).norm()) < 1e-5
        for label in FACTORS:
            trained, before = getattr(second[name], label), getattr(held[name], label)
            moved = float((getattr(factors, label) - trained).norm())
            assert 0 < moved < 0.2 * float((trained - before).norm()), "another basis"


@pytest.mark.parametrize("dead", ["lora_A", "lora_B"])
def test_a_direction_that_is_dead_is_no_obstacle(dead):
    """Rows of ``lora_A`` that do not span the product's, and a product below the rank."""
    held, (first, second) = rounds_of("new", count=2)
    error = lost(first, None, over_the_wire(first, "int8", held=held), "products")
    for factors in second.values():
        row = factors.lora_A[1] if dead == "lora_A" else factors.lora_B[:, 1]
        row.zero_()
    sent = compensated(second, error, "products")
    for name in WIDE:
        wanted = dense(second)[name] + dense(error)[name]
        left, right = reference_wire.best(wanted.numpy(), 4)
        assert float((dense(sent)[name] - torch.from_numpy(left @ right)).norm()) < 1e-5
        assert bool(torch.isfinite(sent[name].lora_B).all())


def test_an_error_beyond_what_is_kept_is_cut_and_grows_slower_than_without():
    """Fresh directions every round leave more behind than an upload of rank 2 has room for."""
    shapes = {"m": (48, 48)}
    trained = [random_adapter(shapes, 2, seed=k, dtype=torch.float32) for k in range(64)]
    decoded, errors = uploads(trained, "products", held=None)
    plain, _ = uploads(trained, "products", held=None, feedback=False)

    def drift(sums):
        pairs = zip(trained, sums, strict=True)
        return float(sum(dense(a)["m"] - dense(b)["m"] for a, b in pairs).norm())

    assert {error["m"].rank for error in errors[8:]} == {8}
    assert drift(decoded) < 0.95 * drift(plain)


# --- which methods ----------------------------------------------------------------------------


def int8_round(method, state, server_round, errors, *, feedback, seed=0):
    """One round of five clients over int8, and what was trained: ``(next state, updates)``."""
    space = feedback_space(method)
    round_ = OneRound(method, state, wire="int8")
    trained, sent = [], []
    for k in range(5):
        update, start = round_.update(k, 10 + k, seed=seed + server_round), round_.start(k)
        trained.append((update.adapter, update.num_examples, start.trained))
        error = errors.get(k)
        labels = start.trainable
        adapter = compensated(update.adapter, error, space, labels) if feedback else update.adapter
        decoded = over_the_wire(adapter, "int8", labels, start.trained)
        if feedback:
            errors[k] = lost(update.adapter, error, decoded, space, labels)
        sent.append(replace(update, adapter=decoded))
    return round_.finish(sent), trained


@pytest.mark.parametrize("method", sorted(SPACES))
def test_a_round_in_which_nobody_trained_changes_nothing_over_int8(method):
    """What is subtracted is what was decoded; a rounded start that comes back is not rounded."""
    state = next_state(method, wire="int8")
    for _ in range(3):
        round_ = OneRound(method, state, wire="int8")
        updates = []
        for k in range(5):
            update, start = round_.update(k, 10 + k, trained=False), round_.start(k)
            back = over_the_wire(update.adapter, "int8", start.trainable, start.trained)
            assert back.digest() == start.trained.digest()
            error = lost(update.adapter, None, back, SPACES[method], start.trainable)
            assert not any(factors.lora_B.any() for factors in error.values())
            assert compensated(start.trained, error, SPACES[method], start.trainable).digest() == (
                start.trained.digest()
            )
            updates.append(replace(update, adapter=back))
        later = round_.finish(updates)
        assert distance(later.change, state.change) < 1e-12
        state = later


@pytest.mark.parametrize(
    "method", sorted(set(METHODS) - set(SPACES) - {"basis", "hetlora", "slora"})
)
def test_a_method_that_takes_the_mean_of_what_comes_back_takes_the_rounding_too(method):
    """Why these are refused: nobody trains, and what was learned moves by the download's step."""
    state = next_state(method, wire="int8")
    round_ = OneRound(method, state, wire="int8")
    updates = [round_.update(k, 10 + k, trained=False) for k in range(5)]
    assert distance(round_.finish(updates).change, state.change) > 1e-3


@pytest.mark.parametrize("method", sorted(METHODS))
def test_int8_is_for_the_methods_that_add_changes(method):
    if method in SPACES:
        check_wire("int8", method)
    else:
        with pytest.raises(UserError, match=f"method.name={method} cannot use, since it .*bfloat"):
            check_wire("int8", method)
    for dtype in ("float32", "bfloat16", "float64"):
        check_wire(dtype, method)


def test_the_published_form_may_with_the_servers_own_feedback():
    """Its rule is then that of the residual form; raflora's bands are of terms that would mix."""
    check_wire("int8", "flexlora", error_feedback=True)
    with pytest.raises(UserError, match=r"or method.error-feedback=true"):
        check_wire("int8", "flexlora")
    with pytest.raises(UserError, match="weighs single terms"):
        check_wire("int8", "raflora", error_feedback=True)
    with pytest.raises(UserError, match="sends other rows every round"):
        check_wire("int8", "basis")


@pytest.mark.parametrize("method", ["residual", "carried", "aligned", "flora"])
def test_what_the_server_has_does_not_drift_from_what_its_clients_trained(method):
    """Through the server's own sum: 24 rounds of five clients, each with its own error."""
    drifts = {}
    for feedback in (True, False):
        state, errors = State(round=0, change=GlobalChange.zero(SHAPES)), {}
        expected = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
        for server_round in range(24):
            state, trained = int8_round(method, state, server_round, errors, feedback=feedback)
            examples = sum(count for _, count, _ in trained)
            for adapter, count, start in trained:
                change = dense(adapter)
                if method in ("residual", "carried"):
                    change = minus(change, dense(start))
                for name in SHAPES:
                    expected[name] += state.server_learning_rate * count / examples * change[name]
        drifts[feedback] = distance(state.change, expected)
    assert drifts[True] < 0.5 * drifts[False]


# --- where it lies ----------------------------------------------------------------------------


def upload_of(uplink, client_id, server_round, *, seed=None, held=None):
    """One client's round: what is to be encoded, and what it had trained."""
    held = start_of() if held is None else held
    job = train_job(held, client_id, server_round=server_round)
    adapter = noisy(held, FACTORS, server_round if seed is None else seed, size=0.05)
    result = TrainResult(
        client_id=client_id,
        rank_class=job.start.rank_class.name,
        base_round=job.start.base_round,
        digest=job.start.digest,
        adapter=adapter,
        note="was slow",
    )
    return uplink.ready(result, job), adapter


def uplink_over(store):
    return Uplink(dtype="int8", space="products", store=store)


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_a_repeated_round_sends_the_same_bytes(where, tmp_path):
    """Also after a later round was sent, and by a process that only has the folder."""
    store = PersonalStore(tmp_path if where == "folder" else None)
    sent = [upload_of(uplink_over(store), "a", at)[0].adapter.digest() for at in (1, 2, 4)]
    again = PersonalStore(tmp_path) if where == "folder" else store
    assert upload_of(uplink_over(again), "a", 4)[0].adapter.digest() == sent[2]
    plain = upload_of(uplink_over(again), "b", 4)
    assert plain[0].adapter.digest() == plain[1].digest() != sent[2], "what b never lost"


def test_only_int8_keeps_anything(tmp_path):
    for dtype in ("float32", "bfloat16"):
        uplink = Uplink(dtype=dtype, space="products", store=PersonalStore(tmp_path / "kept"))
        result, adapter = upload_of(uplink, "a", 1)
        assert result.adapter.digest() == adapter.digest() and result.note == "was slow"
    assert not (tmp_path / "kept").exists()


def test_a_client_that_keeps_nothing_says_so():
    result, adapter = upload_of(uplink_over(None), "a", 1)
    assert result.adapter.digest() == adapter.digest()
    assert result.note == (
        "was slow; int8 without error feedback: nothing is kept between rounds here"
    )


def test_a_client_that_could_not_train_goes_on_from_what_it_had(tmp_path):
    store = PersonalStore(tmp_path)
    upload_of(uplink_over(store), "a", 1)
    job = train_job(start_of(), "a", server_round=2)
    failed = TrainResult(client_id="a", rank_class="", base_round=1, digest="", cause="no rows")
    assert uplink_over(store).ready(failed, job) is failed
    assert store.before("a", 3).server_round == 1


def test_what_cannot_be_kept_is_not_sent_either(tmp_path, monkeypatch):
    """A full disk: the old error must not be added twice, so it waits."""
    store = PersonalStore(tmp_path)
    upload_of(uplink_over(store), "a", 1)

    def full(kept):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "put", full)
    result, adapter = upload_of(uplink_over(store), "a", 2)
    assert result.adapter.digest() == adapter.digest()
    assert result.note.startswith("was slow; int8 without error feedback: OSError")
    assert store.before("a", 3).server_round == 1


def test_a_damaged_file_is_told_and_costs_no_update(tmp_path):
    store = PersonalStore(tmp_path, what="factors kept for the next upload")
    upload_of(uplink_over(store), "a", 1)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-5])
    result, adapter = upload_of(uplink_over(store), "a", 2)
    assert result.adapter.digest() == adapter.digest()
    assert "client a: the factors kept for the next upload in" in result.note


def test_an_error_of_other_modules_is_told(tmp_path):
    store = PersonalStore(tmp_path)
    upload_of(uplink_over(store), "a", 1)
    other = random_adapter({"attn.q": (24, 16), "mlp.up": (16, 25)}, 4, dtype=torch.float32)
    result, adapter = upload_of(uplink_over(store), "a", 2, held=other)
    assert result.adapter.digest() == adapter.digest()
    assert "module 'mlp.up': the stored rounding error has another shape" in result.note


def test_an_error_outlasts_a_change_of_rank():
    """Products have no rank of their own; of factors the rows beyond a lower rank wait."""
    wide, narrow = start_of(4), start_of(2)
    update = noisy(wide, FACTORS, 1, size=0.05)
    error = lost(update, None, over_the_wire(update, "int8", held=wide), "products")
    sent = compensated(narrow, error, "products")
    assert {f.rank for f in sent.values()} == {2} and sent.digest() != narrow.digest()
    labels = ("lora_B",)
    error = lost(update, None, over_the_wire(update, "int8", labels, wide), "factors", labels)
    below = lost(narrow, error, over_the_wire(narrow, "int8", labels, narrow), "factors", labels)
    for name, factors in below.items():
        assert factors.rank == 4
        waiting = error[name].scaling * error[name].lora_B[:, 2:]
        assert torch.allclose(factors.scaling * factors.lora_B[:, 2:], waiting) and waiting.any()


def test_factors_of_any_alpha_are_compensated_in_units_of_the_product():
    """Trap T1: what is kept has no alpha, what is sent has that of its client."""
    labels = ("lora_B",)
    factors = start_of(4)["attn.q"]
    for alpha, rslora in ((3.0, False), (16.0, True)):
        own = Adapter(
            {
                "attn.q": LoRAFactors(
                    lora_A=factors.lora_A, lora_B=factors.lora_B + 0.01, alpha=alpha, rslora=rslora
                )
            }
        )
        held = Adapter({"attn.q": replace(own["attn.q"], lora_B=0.9 * factors.lora_B)})
        back = over_the_wire(own, "int8", labels, held)
        error = lost(own, None, back, "factors", labels)
        missing = dense(own)["attn.q"] - dense(back)["attn.q"]
        kept = error["attn.q"]
        assert torch.allclose(kept.lora_B.double() @ factors.lora_A.double(), missing, atol=1e-8)
        assert float(missing.abs().max()) > 1e-5


def test_the_space_is_that_of_the_runs_method():
    def of(**changes):
        return Uplink.of(Config().with_values(of_names(wire__dtype="int8", **changes)), None)

    assert of().space == "products" and of().dtype == "int8"
    assert of(method__name="rolora").space == "factors"
    assert of(method__name="flexlora").space == ""
    assert of(method__name="flexlora", method__error_feedback=True).space == "products"
