"""The int8 wire and its error feedback, slow and obvious: one number at a time, dense, float64.

Nothing here imports the product's arithmetic.
"""

from __future__ import annotations

import math

import numpy as np


def scale_of(numbers):
    """The smallest number of 17 significant bits that is not below ``max |x| / 127`` in float32."""
    step = float(np.float32(np.float32(max(abs(float(x)) for x in numbers)) / np.float32(127)))
    if step < 2.0**-126:
        return 0.0
    mantissa, exponent = math.frexp(step)
    return min(math.ldexp(math.ceil(mantissa * 2**17) / 2**17, exponent), 2.0**121)


def rounded(numbers):
    """One row as it is decoded: every number to the nearest multiple of the row's scale."""
    scale = scale_of(numbers)
    if scale == 0.0:
        return [0.0 for _ in numbers]
    codes = [round(float(np.float32(x) / np.float32(scale))) for x in numbers]  # half to even
    return [scale * max(-127, min(127, code)) for code in codes]


def decoded(factor, label):
    """``lora_A`` row by row, ``lora_B`` column by column."""
    matrix = factor.double().numpy()
    rows = matrix if label == "lora_A" else matrix.T
    result = np.array([rounded(row) for row in rows])
    return result if label == "lora_A" else result.T


def decoded_with(factor, label, held):
    """The same where the other side has ``held`` and the smaller of the two numbers travels."""
    whole, known = factor.double().numpy(), held.double().numpy()
    change = (factor - held).double()
    if np.linalg.norm(change.numpy()) < np.linalg.norm(whole):
        return (known.astype(np.float32) + decoded(change, label).astype(np.float32)).astype(float)
    return decoded(factor, label)


def feedback(trained, send):
    """Error feedback as it is defined: ``sent = send(M)``, ``M = trained + E``, ``E = M - sent``.

    ``trained`` are dense matrices, one a round; gives what was sent and every E.
    """
    error, sent, errors = np.zeros_like(trained[0]), [], []
    for change in trained:
        wanted = change + error
        sent.append(send(wanted))
        error = wanted - sent[-1]
        errors.append(error)
    return sent, errors


def best(matrix, rank):
    """The best factors of that rank by LAPACK's dense SVD, singular values on the left."""
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank], Vh[:rank]


def rounded_best(matrix, rank):
    """The best product of that rank with both factors rounded."""
    left, right = best(matrix, rank)
    left = np.array([rounded(column) for column in left.T]).T
    return left @ np.array([rounded(row) for row in right])
