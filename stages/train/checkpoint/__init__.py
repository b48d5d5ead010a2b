SHARD_BYTES = 5 * 10**9
"""Largest size of a file, which bounds the memory of readers and writers, and which the Hub accepts."""
FLUSH_BYTES = 256 * 2**20
"""Bytes after which a file of a checkpoint is flushed, so that progress means bytes on the disk."""
