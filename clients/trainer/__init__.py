"""The resident trainer of an edge node: one process that keeps the base model and does the work.

The ClientApp, which Flower starts anew for every message, passes the message to it over a Unix
socket (``client.py``) and imports no torch. ``service.py`` reads top to bottom.
"""
