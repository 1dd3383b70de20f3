"""Configurations that the clients' noise does not cover are refused by name."""

import pytest

from faulty_grid import settings
from flexlora import UserError
from flexlora.aggregation import METHODS
from flexlora.server.settings import check_config

PRIVATE = {"privacy__clip": 0.5, "privacy__noise_multiplier": 3.0, "wire__dtype": "float32"}


def private(mode, **changes):
    method = {"method__name": "ffa-lora" if mode == "local" else "carried"}
    return settings(**{**PRIVATE, "privacy__mode": mode, **method, **changes})


@pytest.mark.parametrize("mode", ["local", "example"])
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"privacy__clip": 0.0}, "privacy.clip is 0 with privacy.mode=.*: noise hides nothing"),
        ({"privacy__noise_multiplier": 0.0}, "privacy.noise-multiplier is 0 .* expected at least"),
        ({"personal__rank": 2}, "personal.rank is 2 .*: personal factors are trained without"),
        ({"sampling__policy": "utility"}, "sampling.policy is utility .* which are withheld"),
        ({"privacy__clip_quantile": 0.5}, "privacy.clip-quantile is 0.5 .* central does"),
        ({"privacy__as_if_clients": 99}, "privacy.as-if-clients is 99 .* central does"),
        ({"start_from": "RUN"}, "start-from is .*RUN' .* is in no ledger"),
    ],
)
def test_what_no_noise_covers_is_refused(mode, changes, sentence):
    check_config(private(mode))
    with pytest.raises(UserError, match=sentence):
        check_config(private(mode, **changes))


def test_local_noise_counts_half():
    check_config(private("example", privacy__noise_multiplier=0.015))
    with pytest.raises(UserError, match=r"noise-multiplier is 0.015 .* at least 0.02"):
        check_config(private("local", privacy__noise_multiplier=0.015))


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"basis", "ffa-lora"}))
def test_local_noise_needs_a_linear_upload(method):
    check_config(private("local", method__name="basis"))
    with pytest.raises(UserError, match=f"method.name is {method}, which .* takes basis or ffa-"):
        check_config(private("local", method__name=method))


@pytest.mark.parametrize(
    ("mode", "changes", "sentence"),
    [
        ("local", {"wire__dtype": "int8"}, "wire.dtype is int8 with privacy.mode=local: what"),
        ("example", {"method__name": "aligned"}, "method.name is aligned .* before the first step"),
        ("example", {"lora__dropout": 0.1}, "lora.dropout is 0.1 .*: a row's mask depends"),
        (
            "example",
            {"model__quantization": "8bit", "model__outlier_threshold": 6.0},
            "model.outlier-threshold is 6 .*: which columns are outliers",
        ),
    ],
)
def test_what_one_of_the_two_excludes(mode, changes, sentence):
    check_config(private(mode))
    with pytest.raises(UserError, match=sentence):
        check_config(private(mode, **changes))
    if "lora__dropout" in changes:
        check_config(private("local", **changes))
