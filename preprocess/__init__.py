"""Text to tokens: sources, tokenizer, shard format, manifest.

The way through: :mod:`~amlaunch.preprocess.sources.source` gives one element's documents,
:mod:`~amlaunch.preprocess.tokenizers.tokenizer` makes tokens of them, :mod:`~amlaunch.preprocess.stages.element`
cuts them into shards (:mod:`~amlaunch.preprocess.shards.shard_format` is their format, and all that a
reader needs), and :mod:`~amlaunch.preprocess.stages.verify` checks every shard and writes the
manifest that the trainer reads.
"""
