"""The clients of a configuration, their rows and the rows' tokens.

A client's rows are tokenised at first use and cached, so a node tokenises the rows of its client
only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexlora.data.chat import DEFAULT_DATE
from flexlora.data.collation import Example, encode_rows
from flexlora.data.digests import ids_digest, rows_digests
from flexlora.data.encoding import layout_of
from flexlora.data.partitions import partition
from flexlora.data.rows import Row
from flexlora.data.sources import load_embedded, load_folder, load_hub
from flexlora.data.vocabulary import check_vocabulary, max_token_id
from flexlora.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ClientData", "RowCount", "client_rows", "count_rows"]

EMBEDDED_CLIENTS = 24
PROBED = 32  # clients whose first row is in the digest of tokens


@dataclass(frozen=True, kw_only=True)
class RowCount:
    """How many rows are trained on, and how many do not fit ``max_length`` tokens (0: unknown)."""

    examples: int
    dropped: int
    max_length: int = 0

    def __str__(self) -> str:
        text = f"{self.examples} row{'' if self.examples == 1 else 's'} to train on"
        if not self.dropped:
            return text
        fit = "does not fit" if self.dropped == 1 else "do not fit"
        limit = f"{self.max_length} tokens" if self.max_length else "train.max-length"
        return f"{text}; {self.dropped} {fit} in {limit}"


def count_rows(
    rows: Sequence[Row], *, tokenizer: PreTrainedTokenizerBase, template: str, max_length: int
) -> RowCount:
    """The rows that training would use, counted by encoding them as it does.

    Raises:
        UserError: see ``encode_rows``.
    """
    data = ClientData(
        {"": {"train": list(rows)}}, tokenizer=tokenizer, template=template, max_length=max_length
    )
    return data.count("", "train")


def client_rows(
    *,
    path: str,
    name: str,
    kind: str,
    num_clients: int,
    dirichlet_alpha: float,
    seed: int,
    tasks: str = "default",
) -> dict[str, dict[str, list[Row]]]:
    """``{client_id: {split: rows}}`` from a folder, a hub data set, or the built-in tasks.

    Raises:
        UserError: both a folder and a name, data that cannot be read or dealt, no clients at all.
    """
    if path and name:
        raise UserError(f"data.path is '{path}' and data.name '{name}', expected one of the two.")
    if path:
        rows = load_folder(path)
    elif name:
        rows = load_hub(name)
    else:
        # Other partitions redistribute the rows of the default clients.
        count = num_clients if kind == "client" and num_clients else EMBEDDED_CLIENTS
        rows = load_embedded(count, seed, tasks)
    clients = partition(
        rows, kind=kind, num_clients=num_clients, dirichlet_alpha=dirichlet_alpha, seed=seed
    )
    if not clients:
        raise UserError("the data holds no client, expected at least one with train rows.")
    return clients


class ClientData:
    """Encoded rows by client and split, checked before the first is encoded.

    ``vocabulary`` is the number of token ids that the model embeds (None: not checked), ``date``
    the day of chat templates that read the clock.

    Raises:
        UserError: a template that cannot be rendered, a row that the chat template would lose some
            of, a token that the model does not know.
    """

    def __init__(
        self,
        rows: Mapping[str, Mapping[str, list[Row]]],
        *,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        max_length: int,
        date: str = DEFAULT_DATE,
        vocabulary: int | None = None,
    ) -> None:
        self._rows, self._tokenizer = rows, tokenizer
        self._template, self._max_length, self._date = template, max_length, date
        self._encoded: dict[tuple[str, str], tuple[list[Example], int]] = {}
        self._check(vocabulary)

    @property
    def client_ids(self) -> list[str]:
        return list(self._rows)

    def foreign_layouts(self) -> Counter[str]:
        """How many rows were read from keys that are not ours, by these keys."""
        splits = (rows for of_client in self._rows.values() for rows in of_client.values())
        return Counter(row.layout for rows in splits for row in rows if row.layout)

    def rename(self, client_id: str) -> None:
        """Name the only client of a node that trains on its whole data folder."""
        (only,) = self._rows.values()
        self._rows = {client_id: only}

    def held(self, client_id: str) -> dict[str, int]:
        """The number of rows of every split, those that are too long included."""
        return {split: len(rows) for split, rows in self._rows[client_id].items()}

    def count(self, client_id: str, split: str) -> RowCount:
        """The number of rows of one split, after the length limit."""
        examples, dropped = self._encode(client_id, split)
        return RowCount(examples=len(examples), dropped=dropped, max_length=self._max_length)

    def examples(self, client_id: str, split: str) -> list[Example]:
        """The rows of one split that fit ``max_length``, in order."""
        return self._encode(client_id, split)[0]

    def digests(self) -> dict[str, str]:
        """The digest of every split over all clients."""
        return rows_digests(self._rows)

    def tokens_digest(self) -> str:
        """Over the ids of the first train row of a few clients: the template and the tokenizer."""
        firsts = (self.examples(client_id, "train")[:1] for client_id in self.client_ids[:PROBED])
        return ids_digest(example for rows in firsts for example in rows)

    def _check(self, vocabulary: int | None) -> None:
        layout_of(self._tokenizer, self._template, self._date).check(
            row for splits in self._rows.values() for rows in splits.values() for row in rows
        )
        if vocabulary is None or max_token_id(self._tokenizer) < vocabulary:
            return
        for client_id, splits in self._rows.items():
            for split in splits:
                who = f"client '{client_id}', {split} rows"
                rows = self.examples(client_id, split)
                chosen = [choice for row in rows for choice in row.choices]
                check_vocabulary([*rows, *chosen], vocabulary, self._tokenizer, who=who)

    def _encode(self, client_id: str, split: str) -> tuple[list[Example], int]:
        key = (client_id, split)
        if key not in self._encoded:
            self._encoded[key] = encode_rows(
                self._rows[client_id].get(split, []),
                tokenizer=self._tokenizer,
                template=self._template,
                max_length=self._max_length,
                date=self._date,
            )
        return self._encoded[key]
