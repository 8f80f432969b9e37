"""Text to tokens: sources, tokenizers, shards and the manifest.

The path of a document: :mod:`~amlaunch.preprocess.sources.source` yields it,
:mod:`~amlaunch.preprocess.tokenizers.tokenizer` tokenises it, :mod:`~amlaunch.preprocess.stages.part_writer` writes it
to a shard (:mod:`~amlaunch.preprocess.shards.shard_format` defines the format, and is all that a reader needs), and
:mod:`~amlaunch.preprocess.stages.verify` checks every shard and writes the manifest that the trainer reads.
"""
