"""Token shards as samples and batches: windows, packed documents and mixtures, in a reproducible order."""

from amlaunch.trainer.data.datasets import MixedDataset, NanogptDataset

__all__ = ["MixedDataset", "NanogptDataset"]
