"""Tests, their fixtures, and the long tests of the soak."""

from pipeline.core import process

process.collect_rarely()  # before anything large is imported, in pytest and in the processes of fixtures
