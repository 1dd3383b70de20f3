"""Flower ClientApp side of FlexLoRA: installed as ``flexlora.clients``."""
