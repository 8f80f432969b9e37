"""The work of the preprocess and verify stages: parts become shards, and shards a manifest."""
