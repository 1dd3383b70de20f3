"""The embedded base's tokenizer: bytes, and whole words of the pretraining corpus' running text.

A word is one token only after a space or with a capital, as in an instruction. What a task works on
(``sebota``, ``4072``) stands at the start of a line or after a comma, in small letters: it is
spelled letter by letter, so that reversing or encoding it is possible at all. Other text falls back
to bytes, so nothing is ever unknown.

The chat template writes what the base was pretrained on, bos and the space after "Answer:" among it
(``corpus.plain_prompt``). The tokenizer puts bos before any other text too.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from flexlora.simulations.make_base.corpus import documents

__all__ = ["CHAT_TEMPLATE", "SPECIAL_TOKENS", "VOCABULARY_SIZE", "train_tokenizer"]

SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}
VOCABULARY_SIZE = 640
FEWEST_OCCURRENCES = 10
# The system's lines, the question's (or of a longer conversation the turns', labelled by role), and
# "Answer: " with the answer behind it.
CHAT_TEMPLATE = """\
{%- set answered = messages[-1]['role'] == 'assistant' and not add_generation_prompt -%}
{%- set before = messages[:-1] if answered else messages -%}
{%- set turns = before | rejectattr('role', 'equalto', 'system') | list -%}
{{- bos_token -}}
{%- for message in before if message['role'] == 'system' and message['content'] -%}
{{- message['content'] + '\\n' -}}
{%- endfor -%}
{%- for message in turns -%}
{%- if turns | length > 1 -%}
{{- message['role'] | capitalize + ': ' + message['content'] + '\\n' -}}
{%- elif message['content'] -%}
{{- message['content'] + '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if answered -%}
{{- 'Answer: ' + messages[-1]['content'] + eos_token -}}
{%- elif add_generation_prompt -%}
{{- 'Answer: ' -}}
{%- endif -%}
"""
_WORD = re.compile(r" [A-Za-z]{2,}|\b[A-Z][a-z]+")


def running_words(seed: int, num_documents: int) -> list[str]:
    """Words after a space or capitalised, the most frequent first (ties by spelling)."""
    counts: Counter[str] = Counter()
    for prompt, answer in itertools.islice(documents(seed), num_documents):
        lines = prompt.split("\n") if prompt else [answer]
        # The second line of a task is its input; a full stop tells running text from it.
        counts.update(word for line in lines if line.endswith((".", "?", ": "))
                      for word in _WORD.findall(line))  # fmt: skip
    frequent = [word for word, count in counts.items() if count >= FEWEST_OCCURRENCES]
    return sorted(frequent, key=lambda word: (-counts[word], word))


def train_tokenizer(seed: int, num_documents: int, max_length: int) -> PreTrainedTokenizerFast:
    """WordPiece without a continuation mark: greedy longest match over words and single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [word.replace(" ", "Ġ") for word in running_words(seed, num_documents)]
    tokens = [*SPECIAL_TOKENS.values(), *alphabet]
    tokens += words[: VOCABULARY_SIZE - len(tokens)]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.WordPiece(
            vocab,
            unk_token="<unk>",
            continuing_subword_prefix="",
            max_input_chars_per_word=100_000,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    bos = SPECIAL_TOKENS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, vocab[bos])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        padding_side="right",
        **SPECIAL_TOKENS,
    )
