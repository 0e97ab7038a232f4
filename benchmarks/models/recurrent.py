"""Recurrent networks: language models and a classifier of sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.entry import Entry, entry, tokens

VOCABULARY = 101
Cell = Callable[..., nn.RNNBase]


class LanguageModel(nn.Module):
    """Embedding, recurrent layers, a decoder that may share the embedding's weight (Zaremba et al. 2014).

    Args:
        cell: ``nn.LSTM`` or ``nn.GRU``.
        embedding: width of the embedding; with ``tied`` the width of what the recurrent layers put out.
        hidden: width of the recurrent state.
        tied: decoder and embedding are one parameter (Press & Wolf 2017).
        project: width of the LSTM's projection (Sak et al. 2014); 0: none.
        vocabulary: number of tokens.
    """

    def __init__(
        self,
        cell: Cell,
        *,
        embedding: int,
        hidden: int,
        layers: int = 2,
        tied: bool = False,
        project: int = 0,
        vocabulary: int = VOCABULARY,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        options: dict[str, Any] = {"proj_size": project} if project else {}
        self.rnn = cell(embedding, hidden, num_layers=layers, batch_first=True, dropout=0.1, **options)
        self.decoder = nn.Linear(project or hidden, vocabulary)
        if tied:
            self.decoder.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [batch, length, vocabulary] of token numbers [batch, length]."""
        x, _ = self.rnn(self.embedding(ids))
        out: Tensor = self.decoder(x)
        return out


class Classifier(nn.Module):
    """A bidirectional network that reads a sequence and classifies its last states."""

    def __init__(self, cell: Cell, *, embedding: int, hidden: int, layers: int = 1, classes: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, embedding)
        self.rnn = cell(embedding, hidden, num_layers=layers, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [batch, classes] of token numbers [batch, length]."""
        _, state = self.rnn(self.embedding(ids))
        last = state[0] if isinstance(state, tuple) else state
        out: Tensor = self.head(torch.cat([last[-2], last[-1]], dim=1))
        return out


class Tagger(nn.Module):
    """A bidirectional network with a label for every token: the two directions are concatenated features."""

    def __init__(self, cell: Cell, *, embedding: int, hidden: int, layers: int = 2, classes: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, embedding)
        self.rnn = cell(embedding, hidden, num_layers=layers, batch_first=True, bidirectional=True)
        self.norm = nn.LayerNorm(2 * hidden)
        self.head = nn.Linear(2 * hidden, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [batch, length, classes] of token numbers [batch, length]."""
        x, _ = self.rnn(self.embedding(ids))
        out: Tensor = self.head(self.norm(x))
        return out


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "lstm_lm": lambda: LanguageModel(nn.LSTM, embedding=20, hidden=24),
    "gru_lm": lambda: LanguageModel(nn.GRU, embedding=20, hidden=24),
    "rnn_lm": lambda: LanguageModel(nn.RNN, embedding=20, hidden=24),
    "lstm_lm_tied": lambda: LanguageModel(nn.LSTM, embedding=24, hidden=24, tied=True),
    "gru_lm_tied": lambda: LanguageModel(nn.GRU, embedding=24, hidden=24, tied=True),
    "lstm_lm_projected": lambda: LanguageModel(nn.LSTM, embedding=20, hidden=24, project=14),
    "lstm_lm_tied_projected": lambda: LanguageModel(nn.LSTM, embedding=14, hidden=24, tied=True, project=14),
    "lstm_lm_3_layers": lambda: LanguageModel(nn.LSTM, embedding=20, hidden=24, layers=3),
    "lstm_classifier": lambda: Classifier(nn.LSTM, embedding=20, hidden=24),
    "gru_classifier": lambda: Classifier(nn.GRU, embedding=20, hidden=24, layers=2),
    "lstm_tagger": lambda: Tagger(nn.LSTM, embedding=20, hidden=24),
    "gru_tagger": lambda: Tagger(nn.GRU, embedding=20, hidden=24),
}


def entries() -> Iterator[Entry]:
    """The networks on three sequences of nine tokens."""
    for name, build in NETWORKS.items():
        yield entry(f"rnn:{name}", "recurrent", build, lambda: tokens(3, 9))
