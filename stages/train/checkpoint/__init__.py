SHARD_BYTES = 5 * 10**9
"""Largest size of a file, which bounds the memory of readers and writers, and which the Hub accepts."""
