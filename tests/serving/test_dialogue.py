"""A conversation in a terminal and without one, over the real engine."""

import io

import pytest
from rich.console import Console

from flexlora.errors import UserError
from flexlora.serving.dialogue import Dialogue, Speaker
from flexlora.serving.prompts import Prompts
from flexlora.serving.requests import Sampling
from flexlora.training.models import load_base
from flexlora.training.targets import find_targets
from served import answer, engine_of, strong_adapter

STONE = "Reverse the word: stone"


@pytest.fixture(scope="module")
def engine():
    base = load_base("embedded", device="cpu", fresh=True)
    shapes = find_targets(base.model, "all-linear")
    adapters = {name: strong_adapter(shapes, 4, seed, size=6.0) for seed, name in enumerate("ab")}
    with engine_of(base, adapters) as engine:
        yield engine


@pytest.fixture(scope="module")
def prompts(engine):
    return Prompts(engine.base.tokenizer)


@pytest.fixture(scope="module")
def expected(engine, prompts):
    """Greedy answers to STONE of the base and both adapters."""
    prompt = prompts.chat([("user", STONE)])
    return {
        name: answer(engine, prompt.ids, None if name == "embedded" else name, max_tokens=6)
        .text.removeprefix(prompt.separator)
        for name in ("embedded", "a", "b")
    }  # fmt: skip


@pytest.fixture
def speaker(engine, prompts, expected):
    speaker = Speaker(engine, prompts)
    yield speaker
    speaker.close()


class Typed:
    """Lines that a person types; an exception among them is raised."""

    def __init__(self, *lines):
        self.lines, self.prompts = list(lines), []

    def __call__(self, prompt):
        self.prompts.append(prompt)
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, type):
            raise line
        return line


def dialogue_of(speaker, engine, out, *, terminal=False, remembers=False, tokens=6):
    console = Console(
        file=out, force_terminal=terminal, width=100, color_system=None, highlight=False
    )
    return Dialogue(
        speaker,
        engine.adapters,
        base_name="embedded",
        adapter="a",
        sampling=Sampling(max_tokens=tokens),
        remembers=remembers,
        console=console,
    )


def said(speaker, engine, *lines, patient=True, **options):
    """What is printed, and the prompts that were shown."""
    out, typed = io.StringIO(), Typed(*lines)
    dialogue_of(speaker, engine, out, **options).run(typed, patient=patient)
    return out.getvalue(), typed.prompts


def test_each_line_is_answered_by_whom_it_is_asked(speaker, engine, expected):
    assert len(set(expected.values())) == 3, "distinct"
    found, asked = said(speaker, engine, STONE, "/adapter b", STONE, "", "/base", STONE)
    assert found == f"{expected['a']}\n{expected['b']}\n{expected['embedded']}\n"
    assert asked == ["a> ", "a> ", "b> ", "b> ", "b> ", "embedded> ", "embedded> "]


def test_base_and_adapter_are_compared(speaker, engine, expected):
    both = f"embedded: {expected['embedded']}\na: {expected['a']}\n"
    assert said(speaker, engine, f"/compare {STONE}")[0] == both
    assert said(speaker, engine, STONE, "/compare")[0] == f"{expected['a']}\n{both}"
    shown = said(speaker, engine, f"/compare {STONE}", terminal=True)[0]
    ends = [expected[name].split()[-1] for name in ("embedded", "a")]
    assert any(0 < line.find(ends[0]) < line.rfind(ends[1]) for line in shown.splitlines())


def test_mistakes_are_told_to_a_person_and_end_a_script(speaker, engine, expected):
    mistakes = {
        "/adaptor b": "unknown command '/adaptor'. Did you mean '/adapter'?",
        "/xyz": "unknown command '/xyz'. Expected one of /adapter, ",
        "/adapter c": "no adapter is named 'c'.",
        "/compare": "/compare has no question yet",
        "/base b": "/base takes nothing, here 'b'.",
        "word " * 300: "leaves no room for an answer in the 256 that fit",
    }
    for line, message in mistakes.items():
        found, _ = said(speaker, engine, line, STONE)
        assert message in found.replace("\n", " ") and found.endswith(f"{expected['a']}\n")
        with pytest.raises(UserError, match=message[:20].replace("(", r"\(")):
            said(speaker, engine, line, patient=False)
    assert "needs an adapter" in said(speaker, engine, "/base", f"/compare {STONE}")[0]


def test_help_lists_the_commands_and_adapter_the_adapters(speaker, engine):
    found, _ = said(speaker, engine, "/help", "/adapter", "/quit", STONE)
    assert "/compare" in found and found.endswith("a, b\n")


def test_a_conversation_is_remembered_until_it_is_new(speaker, engine, prompts, expected):
    turns = [("user", STONE), ("assistant", expected["a"]), ("user", STONE)]
    prompt = prompts.chat(turns)
    second = "".join(text for _, text in speaker.ask(["a"], turns, Sampling(max_tokens=6)))
    assert len(prompt.ids) > len(prompts.chat(turns[:1]).ids)
    found, _ = said(speaker, engine, STONE, STONE, "/new", STONE, remembers=True)
    assert found == f"{expected['a']}\n{second or ''}\n{expected['a']}\n"


def test_ctrl_c_cuts_an_answer_and_frees_its_place(speaker, engine, monkeypatch):
    """The interrupt comes after the first text; the conversation goes on."""
    out = io.StringIO()
    dialogue = dialogue_of(speaker, engine, out, tokens=200)
    texts = []

    def interrupted(*asked, ask=speaker.ask):
        for item in ask(*asked):
            texts.append(item)
            yield item
            if len(texts) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(speaker, "ask", interrupted)
    before = engine.stats().cancelled + engine.stats().finished
    dialogue.run(Typed(STONE, "/adapter"), patient=True)
    assert "(cut; Ctrl-C again or /quit ends)" in out.getvalue()
    assert out.getvalue().endswith("a, b\n")
    while engine.stats().cancelled + engine.stats().finished == before:
        pass
    assert engine.stats().cache_bytes_used == 0


def test_ctrl_c_twice_in_a_row_ends(speaker, engine):
    with pytest.raises(KeyboardInterrupt):
        said(speaker, engine, KeyboardInterrupt, KeyboardInterrupt, STONE)
    found, _ = said(speaker, engine, KeyboardInterrupt, "/adapter", KeyboardInterrupt, "/help")
    assert "/quit" in found


def test_an_answer_cannot_write_to_the_terminal(speaker, engine, monkeypatch):
    monkeypatch.setattr(speaker, "ask", lambda *_: iter([(0, "a\x1b[2Jb\nc")]))
    assert said(speaker, engine, "x")[0] == "a\\x1b[2Jb\nc\n"
