"""Flags for opening files, of which a platform may lack some: Windows has only `O_BINARY`, and no pipe to wait for."""

from __future__ import annotations

import os

READ = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
"""To read bytes, without waiting for the writer of a pipe."""
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
"""To open no link."""
