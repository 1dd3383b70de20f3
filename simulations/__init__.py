"""Populations on one machine: installed as ``flexlora.simulations``."""
