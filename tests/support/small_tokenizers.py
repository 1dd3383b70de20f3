"""A byte-level BPE tokenizer, and chat templates of published models, shortened."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = "red green blue seven eleven Answer: Say which colour it is, über 漢字 user assistant"


def byte_bpe(**special):
    """A byte-level BPE tokenizer as GPT-2's, with the special tokens asked for."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([TEXT] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


GEN = "{% if add_generation_prompt %}"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}" + GEN + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content"
    " + ' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{% endif %}"
    "{{ 'Today Date: ' + date_string + '\n\n' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim"
    " + '<|eot_id|>' }}{% endfor %}" + GEN + "{{ '<|start_header_id|>assistant<|end_header_id|>"
    "\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant'"
    " else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    + GEN
    + "{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    + GEN
    + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% endfor %}" + GEN + "{{ '<|assistant|>\n' }}{% endif %}"
)
MISTRAL = (  # Nemo's: the system text stands before the last message, if that is the user's
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m.role == 'user' %}{{ '[INST]' }}{% if loop.last and system is "
    "defined %}{{ system + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}{% else %}"
    "{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% if '</think>' in m.content %}{{ '<think>\n' + m.content.split('</think>')[0].split("
    "'<think>')[-1].strip('\n') + '\n</think>\n\n' + m.content.split('</think>')[-1].lstrip('\n')"
    " }}{% else %}{{ '<think>\n\n</think>\n\n' + m.content }}{% endif %}{% else %}{{ m.content }}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    + GEN
    + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}"
    "{% endfor %}" + GEN + "{{ '<|Assistant|><think>\n' }}{% endif %}"
)
SMOLVLM = (
    "{% for m in messages %}{{ m.role | capitalize }}{% if m.content[0].type == 'image' %}{{ ':' }}"
    "{% else %}{{ ': ' }}{% endif %}{% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    + GEN
    + "{{ 'Assistant:' }}{% endif %}"
)
NO_PROMPT = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"

# The template, its prompt to "Say red.", what is learned of the answer "red".
TABLE = {
    "chatml": (
        CHATML,
        "<|im_start|>user\nSay red.<|im_end|>\n<|im_start|>assistant\n",
        "red<|im_end|>",
    ),
    "llama-2": (LLAMA2, "<s>[INST] Say red. [/INST]", " red </s>"),
    "llama-3": (
        LLAMA3,
        "<s>Today Date: 26 Jul 2024\n\n<|start_header_id|>user<|end_header_id|>\n\nSay red."
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "red<|eot_id|>",
    ),
    "gemma": (
        GEMMA,
        "<s><start_of_turn>user\nSay red.<end_of_turn>\n<start_of_turn>model\n",
        "red<end_of_turn>",
    ),
    "phi-3": (PHI3, "<|user|>\nSay red.<|end|>\n<|assistant|>\n", "red<|end|>"),
    "zephyr": (ZEPHYR, "<|user|>\nSay red.</s>\n<|assistant|>\n", "red</s>"),
    "mistral": (MISTRAL, "<s>[INST]Say red.[/INST]", "red</s>"),
    "qwen3": (
        QWEN3,
        "<|im_start|>user\nSay red.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "red<|im_end|>",
    ),
    "smolvlm": (SMOLVLM, "User: Say red.<end_of_utterance>\nAssistant:", " red<end_of_utterance>"),
    "no prompt": (NO_PROMPT, "user: Say red.</s>assistant:", " red</s>"),
}
SPECIALS = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>", "<|User|>",
    "<|Assistant|>", "<end_of_utterance>", "<think>",
]  # fmt: skip
