"""Tokens: whole or refused, and what of them the server keeps."""

from __future__ import annotations

import pytest

from flexlora.deploy.hosts import parse_superlink
from flexlora.deploy.invitation import Token
from flexlora.errors import UserError

DIGEST = bytes(range(32))


@pytest.mark.parametrize("address", ["fl.example.org:9092", "10.1.2.3:9092", "[fd00::5]:9092"])
def test_a_token_is_read_back_whole_with_spaces_around_it(address):
    token = Token.make(parse_superlink(address, "--address"), DIGEST)
    assert Token.parse(f"  {token}\n") == token
    assert token.secret.hex() not in str(token.secret_digest) and len(token.secret) == 24


def test_every_cut_and_every_changed_letter_is_seen():
    text = str(Token.make(parse_superlink("fl.example.org:9092", "--address"), DIGEST))
    for place in range(len("flexlora1-"), len(text)):
        for damaged in (text[:place], text[:place] + ("A" if text[place] != "A" else "B")):
            with pytest.raises(UserError, match="is not whole: copy the line again"):
                Token.parse(damaged)


def test_something_else_is_no_token():
    for text in ("", "site-a", "-----BEGIN CERTIFICATE-----"):
        with pytest.raises(UserError, match=r"the token is '.*', expected the line that"):
            Token.parse(text)
