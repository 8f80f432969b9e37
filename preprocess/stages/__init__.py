"""The preprocess and verify stages, and ``amlaunch data``: parts become shards, and shards a manifest."""
