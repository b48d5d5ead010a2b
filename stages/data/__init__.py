"""From raw sources to the rows of a training phase. Each room imports only those before it.

- `acquire/`: sources become tables of documents with their licenses.
- `curate/`: documents are filtered and deduplicated; every document gets a disposition.
- `order/`: kept documents become token shards, and every phase gets its order of rows.

`recipe.py` is the schema of a data recipe and names the stages of a corpus; `pinning.py` is `atom pin`. `blocks.py` and
`estimates.py` are what the rooms share.
"""
