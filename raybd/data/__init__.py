"""Shards, the decoded cache, augmented views, and importing other formats."""
