"""Models, questions and answers for the tests of evaluation: words ``w7`` for ids 7."""

import pytest
import torch

from builders import VOCAB
from flexlora.data.collation import Example
from flexlora.training.models import BaseModel

PAD, BOS, EOS = 0, 1, 2


@pytest.fixture(scope="module")
def tokenizer():
    """One word per id, ``w7`` for 7."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="w1", eos_token="w2", pad_token="w0"
    )


def base_of(model, tokenizer):
    device = torch.device("cpu")
    return BaseModel(name="tiny", model=model, tokenizer=tokenizer, fingerprint="", device=device)


def words(ids):
    return " ".join(f"w{i}" for i in ids)


def question(prompt, answer):
    """Ids of a prompt, then of its answer and eos."""
    return Example(
        input_ids=(*prompt, *answer, EOS),
        prompt_length=len(prompt),
        prompt=words(prompt),
        answer=words(answer),
    )


def greedy(model, prompt, count):
    """One token after another by argmax, the whole row again each time."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            token = int(
                model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()
            )
            if token == EOS:
                break
            ids.append(token)
    return words([i for i in ids[len(prompt) :] if i not in (PAD, BOS)])
