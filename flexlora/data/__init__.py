"""From files to batches: rows, where they come from, who holds them, how they read as tokens.

    rows.py        one checked row of federated text: an instruction row or a chat row
    sources.py     splits of rows from a folder of JSONL, the hub, or the built-in tasks
    partitions.py  which client holds which rows, the same way in every split
    templates.py   a row as the text of a prompt and of an answer
    collation.py   tokens, labels, and batches of K slots (needs torch)

Import from these modules; this one imports nothing, so that rows and partitions stay free of torch.
"""
