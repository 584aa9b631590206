"""Shards, the plan, decoding and loading: everything between a tar on disk and a Batch."""
