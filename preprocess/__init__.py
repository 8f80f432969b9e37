"""Text to tokens: sources, tokenizer, shard format, manifest.

The way through: :mod:`~preprocess.sources` gives one element's documents,
:mod:`~preprocess.tokenizer` makes tokens of them, :mod:`~preprocess.element`
cuts them into shards (:mod:`~preprocess.shards` is their format, and all that a
reader needs), and :mod:`~preprocess.verify` checks every shard and writes the
manifest that the trainer reads.
"""
