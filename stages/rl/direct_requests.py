"""Requests to servers of the run, which go past any proxy of the environment."""

from __future__ import annotations

import urllib.request

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens URLs without a proxy: between the nodes of a cluster there is none."""
