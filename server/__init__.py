"""Flower ServerApp side of FlexLoRA: installed as ``flexlora.server``."""
