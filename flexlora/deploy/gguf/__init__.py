"""GGUF files for llama.cpp: an adapter beside a base, or a whole model with its tokenizer."""
