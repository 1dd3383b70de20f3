"""The resident trainer: a process that keeps the base loaded and works for its ClientApps."""
