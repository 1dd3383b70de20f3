"""Keys of a configuration as keyword arguments."""


def of_names(**values):
    """``train__max_steps=3`` as ``{"train.max-steps": 3}``."""
    return {key.replace("__", ".").replace("_", "-"): value for key, value in values.items()}
