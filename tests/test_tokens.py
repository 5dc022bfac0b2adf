"""Kernelspec tokens: what setup writes is what run reads."""

import os

from hypothesis import given
from hypothesis import strategies as st

import envkernel

arguments = st.binary().filter(lambda raw: b"\0" not in raw).map(os.fsdecode)


@given(arguments, st.booleans())
def test_any_bytes_pass_through_a_token(text, force):
    token = envkernel.encode_token(text, force)
    assert token.isascii()
    assert "{" not in token
    assert envkernel.decode_token(token) == text


def test_a_plain_token_stays_readable():
    assert envkernel.encode_token("/opt/my env/it's") == "/opt/my env/it's"
