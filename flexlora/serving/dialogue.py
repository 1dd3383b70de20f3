"""A conversation in a terminal: lines in, answers out as they come, a few commands.

With a chat template the turns before a question are sent with it; a template for single
instructions (``plain``, ``alpaca``) was trained on one turn, so each line is asked alone.
"""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from rich.console import Console
from rich.live import Live
from rich.table import Table

from flexlora.errors import RunFailed, UserError, nearest
from flexlora.printable import printable
from flexlora.serving.adapter_store import AdapterStore
from flexlora.serving.engine import Engine
from flexlora.serving.prompts import Prompts
from flexlora.serving.requests import Piece, Request, Sampling

__all__ = ["Dialogue", "Speaker"]

COMMANDS = {
    "/adapter": "NAME: ask this adapter from now on; without a name: list them",
    "/base": "ask the base alone",
    "/compare": "[TEXT]: base and adapter side by side on TEXT, or on the last question",
    "/new": "forget the conversation",
    "/help": "this list",
    "/quit": "end, as Ctrl-D does",
}


class Speaker:
    """Asks an engine whose ``run`` is in another thread, and gives the text as it comes."""

    def __init__(self, engine: Engine, prompts: Prompts) -> None:
        self._engine, self._prompts = engine, prompts
        self._stop = threading.Event()
        self._thread = threading.Thread(target=engine.run, args=(self._stop,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the engine's thread."""
        self._stop.set()
        self._thread.join(5.0)

    def ask(
        self, adapters: Sequence[str | None], turns: Sequence[tuple[str, str]], sampling: Sampling
    ) -> Iterator[tuple[int, str]]:
        """``(index, text)`` of the answers of several adapters at once, None the base.

        Left early, it cancels what has not ended.

        Raises:
            UserError: as ``Engine.submit``.
            RunFailed: the engine has failed.
        """
        prompt = self._prompts.chat(turns)
        arrived: queue.SimpleQueue[tuple[int, Piece]] = queue.SimpleQueue()
        ids = [uuid.uuid4().hex for _ in adapters]
        silent, left = set(range(len(ids))), len(ids)
        try:
            for index, adapter in enumerate(adapters):
                request = Request(
                    request_id=ids[index],
                    adapter=adapter,
                    prompt_ids=prompt.ids,
                    ends=prompt.ends,
                    sampling=sampling,
                )
                self._engine.submit(request, partial(_put, arrived, index))
            while left:
                index, piece = self._next(arrived)
                left -= piece.finish_reason is not None
                text = piece.text
                if text and index in silent:
                    silent.discard(index)
                    text = text.removeprefix(prompt.separator)
                if text:
                    yield index, text
        finally:
            for request_id in ids:
                self._engine.cancel(request_id)

    def _next(self, arrived: queue.SimpleQueue[tuple[int, Piece]]) -> tuple[int, Piece]:
        while True:
            try:
                index, piece = arrived.get(timeout=0.5)
            except queue.Empty:
                if not self._thread.is_alive():
                    raise RunFailed("the engine has ended.") from None
                continue
            if piece.finish_reason == "error":
                raise RunFailed(f"the answer has failed: {piece.error}")
            return index, piece


def _put(arrived: queue.SimpleQueue[tuple[int, Piece]], index: int, piece: Piece) -> None:
    arrived.put((index, piece))


def _safe(text: str) -> str:
    """Model's text without commands to the terminal; lines and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else printable(c) for c in text)


class Dialogue:
    """Reads lines with ``read`` until it raises ``EOFError``.

    ``adapter`` None is the base; ``base_name`` is what it is called.
    """

    def __init__(
        self,
        speaker: Speaker,
        store: AdapterStore,
        *,
        base_name: str,
        adapter: str | None,
        sampling: Sampling,
        remembers: bool,
        console: Console,
    ) -> None:
        self._speaker, self._store, self._console = speaker, store, console
        self._base_name, self.adapter, self._sampling = base_name, adapter, sampling
        self._remembers = remembers
        self._turns: list[tuple[str, str]] = []
        self._last = ""

    @property
    def name(self) -> str:
        """Who answers."""
        return self.adapter or self._base_name

    def run(self, read: Callable[[str], str], *, patient: bool) -> None:
        """Answer line after line; Ctrl-C cuts an answer, twice in a row ends.

        ``patient``: print a mistake and go on, as with a person; otherwise it is raised.

        Raises:
            KeyboardInterrupt: twice in a row.
            UserError: a mistyped command or a prompt that does not fit, where not ``patient``.
        """
        interrupted = False
        while True:
            try:
                line = read(f"{self.name}> ").strip()
                interrupted = False
                if line == "/quit":
                    return
                if line:
                    self._one(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                self._console.print("\n(cut; Ctrl-C again or /quit ends)", style="dim")
            except UserError as error:
                if not patient:
                    raise
                self._console.print(str(error), style="red")

    def _one(self, line: str) -> None:
        if not line.startswith("/"):
            self._answer(line)
            return
        command, _, rest = line.partition(" ")
        if command not in COMMANDS:
            hint = nearest(command, COMMANDS) or f" Expected one of {', '.join(COMMANDS)}."
            raise UserError(f"unknown command '{command}'.{hint}")
        getattr(self, f"_{command[1:]}")(rest.strip())

    def _answer(self, text: str) -> None:
        self._last = text
        turns = [*self._turns, ("user", text)]
        answer = ""
        try:
            for _, new in self._speaker.ask([self.adapter], turns, self._sampling):
                answer += new
                self._console.print(_safe(new), end="", soft_wrap=True)
        finally:
            if answer:
                self._console.print()
        if self._remembers:
            self._turns = [*turns, ("assistant", answer)]
        if not answer:
            self._console.print("(no text)", style="dim")

    def _adapter(self, name: str) -> None:
        if not name:
            self._console.print(", ".join(self._store.names()) or "there are none")
            return
        self._store.newest(name)
        self.adapter = name

    def _base(self, rest: str) -> None:
        if rest:
            raise UserError(f"/base takes nothing, here '{rest}'.")
        self.adapter = None

    def _new(self, rest: str) -> None:
        if rest:
            raise UserError(f"/new takes nothing, here '{rest}'.")
        self._turns, self._last = [], ""

    def _help(self, _: str) -> None:
        for command, text in COMMANDS.items():
            self._console.print(f"{command:<9} {text}")

    def _compare(self, text: str) -> None:
        text = text or self._last
        if not text:
            raise UserError("/compare has no question yet; give one, as /compare TEXT.")
        if self.adapter is None:
            raise UserError("/compare needs an adapter beside the base; choose one with /adapter.")
        before = self._turns if text != self._last else self._turns[:-2]
        self._last = text
        answers = ["", ""]
        asked = self._speaker.ask([None, self.adapter], [*before, ("user", text)], self._sampling)
        if not self._console.is_terminal:
            for index, new in asked:
                answers[index] += new
            for name, answer in zip((self._base_name, self.name), answers, strict=True):
                self._console.print(f"{name}: {_safe(answer)}", soft_wrap=True)
            return
        with Live(self._side_by_side(answers), console=self._console) as live:
            for index, new in asked:
                answers[index] += new
                live.update(self._side_by_side(answers))

    def _side_by_side(self, answers: Sequence[str]) -> Table:
        table = Table(expand=True)
        for name in (self._base_name, self.name):
            table.add_column(name, ratio=1)
        table.add_row(*map(_safe, answers))
        return table
