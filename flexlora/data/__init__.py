"""From files to batches: sources of rows, their partition over clients, and their tokens.

    rows.py        one checked row of federated text: an instruction row or a chat row
    layouts.py     the row layouts of other tools, read as these two
    sources.py     splits of rows from a folder of JSONL, the hub, or the built-in tasks
    partitions.py  the partition of rows over clients, consistent across splits
    templates.py   a row as the text of a prompt and of an answer
    chat.py        what a chat template writes round an answer
    encoding.py    texts as token ids, without tokens across the boundary
    vocabulary.py  token ids that the model does not embed
    collation.py   tokens, labels, and batches of K slots (needs torch)

This module imports nothing, so that rows and partitions do not need torch.
"""
