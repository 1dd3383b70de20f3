"""What leaves a client under ``privacy.mode=local``: a clipped change, noise, and no losses."""

import math
from dataclasses import replace

import pytest
import torch

from builders import random_adapter, train_job
from flexlora import Adapter, UserError
from flexlora.aggregation.engine.linear_update import linear_norm
from flexlora.config.resolve import Config
from flexlora.privacy.local_noise import noisy_change, privatized
from flexlora.wire.jobs import TrainResult

KEYS = {
    "method.name": "ffa-lora",
    "privacy.mode": "local",
    "privacy.clip": 0.5,
    "privacy.noise-multiplier": 2.0,
    "privacy.reproducible": True,
}


def job_of(shapes, *, trainable=("lora_B",), alpha=6.0, seed=1):
    start = random_adapter(shapes, [3, 5, 2], alpha=alpha, seed=seed)
    return train_job(start, "a", trainable=trainable)


def trained(job, size, seed=3):
    """The start with a change of ``s lora_B`` of a given norm over all modules."""
    start = job.start.trained
    draws = random_adapter(
        {n: (f.out_features, f.in_features) for n, f in start.items()}, [3, 5, 2], seed=seed
    )
    changes = {name: factors.lora_B for name, factors in draws.items()}
    norm = math.sqrt(sum(float((start[n].scaling * c).square().sum()) for n, c in changes.items()))
    return Adapter(
        {n: replace(f, lora_B=f.lora_B + changes[n] * size / norm) for n, f in start.items()}
    )


def result_of(job, adapter, **values):
    return TrainResult(
        client_id="a",
        rank_class=job.start.rank_class.name,
        base_round=0,
        digest=job.start.digest,
        num_examples=7,
        adapter=adapter,
        steps=2,
        tokens=50,
        train_loss=1.0,
        loss_before=2.0,
        loss_after=1.5,
        **values,
    )


def change_of(adapter, start):
    """``s (B - B_start)`` of all modules in one vector."""
    return torch.cat(
        [(start[n].scaling * (f.lora_B - start[n].lora_B)).flatten() for n, f in adapter.items()]
    )


@pytest.mark.parametrize("size", [0.1, 0.5, 40.0])
def test_the_change_is_clipped_and_then_covered_by_noise(shapes, size):
    job = job_of(shapes)
    start, adapter = job.start.trained, trained(job, size)
    sent = noisy_change(adapter, job.start, 0.5, 2.0, seed=9)
    noise = change_of(noisy_change(start, job.start, 0.5, 2.0, seed=9), start)
    clipped = change_of(sent, start) - noise
    assert float(clipped.norm()) == pytest.approx(min(size, 0.5), rel=1e-9)
    direction = change_of(adapter, start)
    torch.testing.assert_close(clipped / clipped.norm(), direction / direction.norm())
    for name, factors in sent.items():
        assert torch.equal(factors.lora_A, start[name].lora_A)


def test_the_noise_has_the_deviation_that_is_accounted(shapes):
    """Over all numbers of ``s lora_B``; a wrong factor of 2, or a forgotten scaling, fails."""
    wide = {name: (40 * out, width) for name, (out, width) in shapes.items()}
    job = job_of(wide, alpha=20.0)
    noise = change_of(noisy_change(None, job.start, 0.5, 3.0, seed=4), job.start.trained)
    assert len(noise) > 4000
    assert float(noise.std()) == pytest.approx(1.5, rel=0.04)
    assert abs(float(noise.mean())) < 5 * 1.5 / math.sqrt(len(noise))


def test_two_clients_are_at_most_two_clips_apart(shapes):
    """The sensitivity of the theorem is reached by opposite changes."""
    job = job_of(shapes)
    start = job.start.trained
    one = trained(job, 3.0)
    other = Adapter(
        {n: replace(f, lora_B=2 * start[n].lora_B - one[n].lora_B) for n, f in start.items()}
    )
    sent = [change_of(noisy_change(a, job.start, 0.5, 2.0, seed=1), start) for a in (one, other)]
    assert float((sent[0] - sent[1]).norm()) == pytest.approx(1.0, rel=1e-9)


def test_only_the_upload_and_public_counts_leave(shapes):
    job = job_of(shapes)
    sent = privatized(result_of(job, trained(job, 1.0)), job, Config.of(KEYS))
    assert sent.withheld and sent.tokens == 0 and sent.num_examples == 7
    for name in ("train_loss", "loss_before", "loss_after"):
        assert math.isnan(getattr(sent, name))
    plain = result_of(job, trained(job, 1.0))
    assert privatized(plain, job, Config()) is plain


@pytest.mark.parametrize("how", ["no factors", "infinite factors"])
def test_a_training_that_diverged_leaves_as_noise(shapes, how):
    """Whether it diverged is of the rows, so its cause does not leave either."""
    job = job_of(shapes)
    config = Config.of(KEYS)
    adapter = None
    if how == "infinite factors":
        adapter = trained(job, 1.0)
        next(iter(adapter.values())).lora_B[0, 0] = torch.inf
    diverged = result_of(job, adapter, cause="" if adapter else "the training loss is not finite")
    sent = privatized(diverged, job, config)
    quiet = privatized(result_of(job, job.start.trained), job, config)
    assert not sent.cause and sent.adapter.digest() == quiet.adapter.digest()
    failed = TrainResult.failed("a", "no train rows")
    assert privatized(failed, job, config).cause == "no train rows"
    assert privatized(failed, job, config).adapter is None


def test_the_seed_draws_the_noise_only_where_that_is_asked_for(shapes):
    job = job_of(shapes)
    result = result_of(job, trained(job, 1.0))

    def sent(**changes):
        return privatized(result, job, Config.of({**KEYS, **changes})).adapter.digest()

    assert sent() == sent() != sent(seed=1)
    hidden = {"privacy.reproducible": False}
    assert sent(**hidden) != sent(**hidden)


@pytest.mark.parametrize("trainable", [("lora_A", "lora_B"), ("lora_A",)])
def test_a_server_that_trains_more_gets_nothing(shapes, trainable):
    job = job_of(shapes, trainable=trainable)
    with pytest.raises(UserError, match=r"expected lora_B alone: noise covers its change"):
        privatized(result_of(job, trained(job, 1.0)), job, Config.of(KEYS))


def test_the_norm_is_that_of_the_linear_sum(shapes):
    """From zero the clipped vector is the ``L_k`` that method basis adds."""
    job = job_of(shapes)
    start = Adapter({n: replace(f, lora_B=0 * f.lora_B) for n, f in job.start.trained.items()})
    job = train_job(start, "a", trainable=("lora_B",))
    clipped = noisy_change(trained(job, 4.0), job.start, 0.5, 0.0, seed=1)
    assert linear_norm(clipped) == pytest.approx(0.5, rel=1e-9)
