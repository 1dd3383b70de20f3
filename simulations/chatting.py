"""``flexlora chat``: talk to a run's adapters or a PEFT folder in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from flexlora.serving.dialogue import Dialogue, Speaker
from flexlora.serving.engine import Engine
from flexlora.serving.requests import Sampling
from flexlora.simulations.serving import default_model
from flexlora.simulations.serving_targets import open_served, target_of

__all__ = ["chat"]


def chat(
    texts: Sequence[str],
    *,
    base: str = "",
    adapter: str = "",
    sampling: Sampling,
    sets: Sequence[str] = (),
    console: Console,
) -> int:
    """Answer lines of standard input until its end; without a terminal, one prompt per line.

    Raises:
        UserError: as ``open_served``; an unknown adapter; without a terminal, a mistyped command.
        KeyboardInterrupt: Ctrl-C twice.
    """
    served = open_served([target_of(text) for text in texts], base=base, sets=sets)
    name = adapter or default_model(served)
    if name != served.base_name:
        served.store.newest(name)
    person = sys.stdin.isatty()
    engine = Engine(served.base, served.store)
    speaker = Speaker(engine, served.prompts)
    dialogue = Dialogue(
        speaker,
        served.store,
        base_name=served.base_name,
        adapter=None if name == served.base_name else name,
        sampling=sampling,
        remembers=person and served.prompts.template == "chat",
        console=console,
    )
    try:
        if person:
            import readline  # noqa: F401  input() then edits lines and remembers them

            console.print(f"{name} answers; /help lists the commands, Ctrl-D ends.", style="dim")
        dialogue.run(input if person else _line, patient=person)
    finally:
        speaker.close()
        engine.close()
    return 0


def _line(_: str) -> str:
    """The next line of standard input.

    Raises:
        EOFError: there is none.
    """
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
