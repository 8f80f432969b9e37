"""Text sources: local files, remote files, Hugging Face datasets and user iterators, each cut into parts."""
