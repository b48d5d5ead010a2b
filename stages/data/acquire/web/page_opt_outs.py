"""Opt-outs of web pages: robots.txt, and the statements of a page that it is not for training.

Honored are `noai` in X-Robots-Tag and in <meta name="robots">, the TDM Reservation Protocol
(https://www.w3.org/community/reports/tdmrep/CG-FINAL-tdmrep-20240510/), robots.txt (RFC 9309) for crawlers that collect
training data, and `ai-train=no` of Content-Signal in robots.txt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

# Crawlers and products under whose names robots.txt files state what may be used for training; `*` is every crawler.
# The names were read from https://github.com/ai-robots-txt/ai.robots.txt, robots.txt at
# 000552c2df1fa3359f8d1a745069194dcbf86605.
_AGENTS = """
* AI2Bot anthropic-ai Applebot-Extended Bytespider CCBot ClaudeBot Google-Extended GPTBot Meta-ExternalAgent
cohere-training-data-crawler
"""
AGENTS = tuple(_AGENTS.split())
# Directives with a value after a colon, which are no names of crawlers.
VALUED = frozenset(("max-image-preview", "max-snippet", "max-video-preview", "unavailable_after"))
# RFC 9309, section 2.5: what a crawler must read of a file.
ROBOTS_BYTES = 500 * 1024

# (name, value) of the headers of an HTTP response.
Headers = Sequence[tuple[str, str]]


def stated_in_headers(headers: Headers, agents: Iterable[str]) -> str:
    """Returns the opt-out in the headers of a response, in words; empty if there is none."""
    for name, value in headers:
        if name.lower() == "x-robots-tag" and _refuses("robots", value, agents):
            return f"X-Robots-Tag: {value[:200]}"
        if name.lower() == "tdm-reservation" and value.strip() == "1":
            return "tdm-reservation: 1"
    return ""


def stated_in_page(tree: Any, agents: Iterable[str]) -> str:
    """Returns the opt-out in the <meta> elements of an lxml tree, in words; empty if there is none."""
    for element in tree.iter("meta"):
        name = (element.get("name") or element.get("http-equiv") or "").strip().lower()
        content = element.get("content") or ""
        if _refuses("robots" if name == "x-robots-tag" else name, content, agents):
            return f'<meta name="{name[:60]}" content="{content[:200]}">'
        if name == "tdm-reservation" and content.strip() == "1":
            return '<meta name="tdm-reservation" content="1">'
    return ""


def _refuses(name: str, value: str, agents: Iterable[str]) -> bool:
    """Returns True if directives keep a page from training: `noai` for crawlers, or `noindex` for one of the agents.

    Args:
        name: The crawler that the directives are for, unless one is named before a directive.
        value: The directives.
        agents: The crawlers whose opt-outs are honored.
    """
    crawlers = {agent.lower() for agent in agents if agent != "*"}
    for part in value.lower().split(","):
        crawler, colon, directive = (text.strip() for text in part.partition(":"))
        if colon and crawler in VALUED:
            continue
        # A crawler holds for the directives after it as well, until another one is named.
        name, directive = (crawler, directive) if colon else (name, crawler)
        if directive == "noai" and (name == "robots" or name.endswith("bot") or name in crawlers):
            return True
        if directive in ("noindex", "none") and name in crawlers:
            return True
    return False


@dataclass
class _Group:
    """Rules of robots.txt for some crawlers: (pattern of a path, whether it is allowed), and ai-train=no."""

    agents: set[str] = field(default_factory=set)
    rules: list[tuple[str, bool]] = field(default_factory=list)
    refuses_training: bool = False


class Robots:
    """The robots.txt files of hosts.

    Memory holds the rules for `agents` of every host that has some.
    """

    def __init__(self, agents: Iterable[str]) -> None:
        self._agents = {agent.lower() for agent in agents}
        self._groups: dict[str, list[_Group]] = {}

    def add(self, url: str, content: bytes) -> None:
        """Adds a robots.txt file, by its URL; only that of the root of a host holds."""
        host, path = _split(url)
        if path != "/robots.txt":
            return
        # Rules before the first user agent go to a group that names no crawler, and so have no effect.
        groups, is_open = [_Group()], False
        for line in content[:ROBOTS_BYTES].decode("utf-8", "replace").splitlines():
            key, _, value = line.partition("#")[0].partition(":")
            key, value = key.strip().lower(), value.strip()
            # Consecutive lines of user agents open one group (RFC 9309, section 2.2.1).
            if key == "user-agent":
                if not is_open:
                    groups.append(_Group())
                groups[-1].agents.add(value.lower())
            # An empty Disallow allows everything, just as no rule does.
            elif key in ("allow", "disallow") and value:
                groups[-1].rules.append((value, key == "allow"))
            elif key == "content-signal" and re.search(r"\bai-train\s*=\s*no\b", value, re.IGNORECASE):
                groups[-1].refuses_training = True
            # A blank line or a comment does not end a list of user agents.
            if key:
                is_open = key == "user-agent"
        relevant = [
            group for group in groups if (group.rules or group.refuses_training) and group.agents & self._agents
        ]
        if relevant:
            self._groups[host] = relevant

    def opt_out(self, url: str) -> str:
        """Returns the reason why robots.txt keeps a page from one of the agents; empty if it does not."""
        host, path = _split(url)
        groups = self._groups.get(host, [])
        for agent in sorted(self._agents & {name for group in groups for name in group.agents}):
            agent_groups = [group for group in groups if agent in group.agents]
            if any(group.refuses_training for group in agent_groups):
                return f"robots.txt says ai-train=no for {agent}"
            rules = [rule for group in agent_groups for rule in group.rules]
            matches = [(len(pattern), allowed) for pattern, allowed in rules if _matches(pattern, path)]
            # The longest pattern wins, and of equal ones Allow (RFC 9309, section 2.2.2).
            if matches and not max(matches)[1]:
                return f"robots.txt disallows {path[:200]} for {agent}"
        return ""


def _split(url: str) -> tuple[str, str]:
    """Returns the host, with a port, and the path, with a query, of an address."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "", ""
    return parts.netloc.lower(), (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _matches(pattern: str, path: str) -> bool:
    """Returns True if a pattern of robots.txt matches a path, by RFC 9309, section 2.2.3.

    `*` stands for any text, and `$` for the end. Regular expressions are not used, since their time has no bound.
    """
    ends, pattern = pattern.endswith("$"), pattern.removesuffix("$")
    first, *rest = pattern.split("*")
    if not path.startswith(first):
        return False
    position = len(first)
    for number, piece in enumerate(rest):
        if ends and number == len(rest) - 1:
            return path.endswith(piece) and len(path) - len(piece) >= position
        position = path.find(piece, position)
        if position < 0:
            return False
        position += len(piece)
    return not ends or position == len(path)
