"""The shard format and the files of an output folder."""
