"""Messages stay short, and keep their beginning and their end."""

from __future__ import annotations

import pickle

import pytest

from etp_graph import errors
from etp_graph.errors import MESSAGE_LENGTH, EtpError


@pytest.mark.parametrize("kind", [kind for kind in vars(errors).values() if isinstance(kind, type)])
@pytest.mark.parametrize("length", [0, 1, MESSAGE_LENGTH, MESSAGE_LENGTH + 1, 10**7])
def test_a_message_keeps_its_place_and_its_remedy(kind: type[EtpError], length: int) -> None:
    text = ("file: " + "x" * length)[:length] if length <= MESSAGE_LENGTH else f"file: {'x' * length} Restore it."
    error = pickle.loads(pickle.dumps(kind(text)))
    if length <= MESSAGE_LENGTH:
        assert str(error) == text
    else:
        assert len(str(error)) <= MESSAGE_LENGTH
        assert str(error).startswith("file: ")
        assert str(error).endswith("Restore it.")
        assert len(repr(error)) < MESSAGE_LENGTH + 100
