"""The license that a web page states for its own text.

What counts: `rel=license` in <link> and in <a>; the license of a text in JSON-LD; links to licenses in the page's
footer. What does not: links in advertisements, comments, quotations, figures and asides; statements on other things,
such as photos or icons; anything on a copy of a page of another site. Two different statements are none that can be
used, and neither is a link to a license whose text, title or picture names another one. The time is linear in the size
of the page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

from stages.data.acquire.licenses import free_text
from stages.data.acquire.licenses.addresses import expression_of

_TEXT_TYPES = """
AboutPage Article BlogPosting Book Chapter CollectionPage Course CreativeWork FAQPage HowTo ItemPage LearningResource
NewsArticle OpinionNewsArticle QAPage Recipe Report ReportageNewsArticle ScholarlyArticle TechArticle WebPage WebSite
"""
# Types of schema.org whose license is that of a page's text.
TEXT_TYPES = frozenset(_TEXT_TYPES.split())
# Types of schema.org of the parts of a page that may state its license.
PAGE_PARTS = frozenset(("Blog", "WebPageElement", "WPFooter"))
# Metadata with the address of the page, or of the one that it copies.
ORIGINALS = frozenset(("og:url", "original-source", "syndication-source"))
# Elements whose content is not the page's own text.
_OTHER_ELEMENTS = "aside blockquote figcaption figure form iframe ins nav noscript q"
OTHER_ELEMENTS = frozenset(_OTHER_ELEMENTS.split())
_OTHER_PLACES = """
ad adbanner adbox ads adsbygoogle adslot adunit advert advertisement advertisements advertising advertorial adverts
banner caption comment commentlist comments dfp disqus embed feedback gallery outbrain partner partners promo promoted
promotion quote related replies reply respond response responses review reviews sidebar sponsor sponsored sponsors
taboola teaser testimonial thumbnail widget widgets
"""
# Words of the names (`_places`) of elements whose content is not the page's own text.
OTHER_PLACES = frozenset(_OTHER_PLACES.split())
# Words of the names of elements that are footers.
FOOTER_PLACES = frozenset(("colophon", "copyright", "footer", "licence", "license", "licensing", "legal"))
# Attributes of a link, and of what is in it, that name a license to people.
LABELS = ("title", "alt", "aria-label", "src")
# Metadata with the license of a page in words.
RIGHTS = frozenset(("dc.rights", "dc.license", "dcterms.rights", "dcterms.license", "rights", "license"))
# What an address may say beyond the words beside it, or these beyond it: the version, and the country.
_MORE_EXACT = re.compile(r"(-\d[\d.]*)?(-(?!N[CD]|SA)[A-Z]+)?")
# Things other than the text, in a statement on a license.
OTHER_THINGS = re.compile(
    r"\b(icons?|photos?|photographs?|photography|images?|pictures?|illustrations?|graphics|artworks?|drawings?|fonts?|"
    r"logos?|themes?|templates?|maps?|tiles|videos?|audio|music|sounds?|code|software|data|datasets?|comments?|advertisements?|"
    r"sponsored)\b",
    re.IGNORECASE,
)
# Beginnings of headings after which the text is of readers.
COMMENTS_HEADING = re.compile(
    r"\W*\d*\W*(comments?|responses?|replies|discussion|feedback|leave a (comment|reply))\b", re.IGNORECASE
)
# The maximum number of characters of a block around a link that states something about it; a longer block is a text in
# which the link occurs.
LONGEST_STATEMENT = 1000
# First or last words of names that describe the layout of a page and not the place of an element.
_LAYOUT = frozenset(("has", "no", "with", "without", "open", "closed", "enabled", "disabled"))
# Elements within a line of text, which are no blocks.
_INLINE = frozenset(("a", "abbr", "b", "bdi", "cite", "em", "font", "i", "small", "span", "strong", "u"))


@dataclass(frozen=True)
class PageLicense:
    """The license that a page states.

    Attributes:
        expression: SPDX; None if the page states no license, an unknown one, or different ones.
        stated: The statements, as expressions or, of unknown licenses, as addresses; "" if there are none.
    """

    expression: str | None = None
    stated: str = ""


class _Link(NamedTuple):
    """A link to a license, and what is said beside it."""

    address: str
    labels: tuple[str, ...] = ()


def license_of(tree: Any, url: str) -> PageLicense:
    """Returns the license that a page states for its text.

    Args:
        tree: The page as lxml parsed it.
        url: Its address; "" if it is unknown.
    """
    # A mirror often adds its own license to the text of others.
    if _is_copy(tree, url):
        return PageLicense()
    page = _Places()
    explicit = [*_in_metadata(tree, page), *_in_body(tree, page, explicit=True)]
    # A link in a footer counts only if nothing states a license explicitly.
    found = explicit or list(_in_body(tree, page, explicit=False))

    links = {urljoin(url, link.address) for link in found}
    statements = {expression_of(link) or link for link in links}
    # Two different statements may be about two things on the page; nobody can tell which one is the text.
    license = next(iter(statements)) if len(statements) == 1 and all(map(expression_of, links)) else None
    if license is not None:
        labels = {label for link in found for label in link.labels} | _rights(tree)
        statements |= {" ".join(label.split())[:200] for label in labels if _contradicts(label, license)}
    return PageLicense(license if len(statements) == 1 else None, " and ".join(sorted(statements))[:500])


def _contradicts(label: str, license: str) -> bool:
    """Returns True if a text names another license than the expression, or a restriction that it does not have."""
    stated = free_text.expression_of(label)
    if stated is None:
        return any(f"-{element}" not in license for element in free_text.restrictions(label))
    names = (free_text.most_exact(stated, [license]), license)
    less, more = sorted((re.sub(r"^LicenseRef-|-(unversioned|only|or-later)$", "", name) for name in names), key=len)
    return not (more.startswith(less) and _MORE_EXACT.fullmatch(more.removeprefix(less)))


def _rights(tree: Any) -> set[str]:
    """Returns what the metadata of a page says of its license in words."""
    elements = (each for each in tree.iter("meta") if (each.get("name") or "").strip().lower() in RIGHTS)
    return {each.get("content") or "" for each in elements}


def _in_metadata(tree: Any, page: _Places) -> Iterator[_Link]:
    for element in tree.iter("link"):
        if "license" in _words(element.get("rel")) and element.get("href") and not page.is_elsewhere(element):
            yield _Link(element.get("href").strip(), _labels(element))
    for element in tree.iter("script"):
        if (element.get("type") or "").strip().lower() == "application/ld+json":
            yield from _in_json(element.text or "")


def _in_json(text: str) -> Iterator[_Link]:
    """Yields the licenses of the texts that JSON-LD describes at its top."""
    try:
        top = json.loads(text)
    except (ValueError, RecursionError):
        return
    nodes = list(top) if isinstance(top, list) else [top]
    for node in list(nodes):
        if isinstance(node, dict):
            nodes += _as_list(node.get("@graph"))
    for node in nodes:
        if isinstance(node, dict) and _types(node) & TEXT_TYPES:
            for license in _as_list(node.get("license")):
                address, name = license, None
                if isinstance(license, dict):
                    address, name = license.get("url") or license.get("@id"), license.get("name")
                if isinstance(address, str) and address.strip():
                    yield _Link(address.strip(), (name,) if isinstance(name, str) else ())


def _types(node: dict[str, Any]) -> set[str]:
    """Returns the types of a node of JSON-LD, without the address of their vocabulary."""
    return {kind.rsplit("/", 1)[-1] for kind in _as_list(node.get("@type")) if isinstance(kind, str)}


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _in_body(tree: Any, page: _Places, explicit: bool) -> Iterator[_Link]:
    """Yields the links with rel=license; if not `explicit`, of links to known licenses in footers."""
    # The level of the heading of readers' comments in which a link is; 0 outside of comments.
    comments_level = 0
    for element in tree.iter("a", "area", "footer", "h1", "h2", "h3", "h4", "h5", "h6"):
        if element.tag == "footer":
            comments_level = 0
        elif element.tag.startswith("h"):
            level = int(element.tag[1])
            # Comments end at the next heading of the same or a higher level.
            if COMMENTS_HEADING.match(_text(element)[:60].strip()):
                comments_level = level
            elif level <= comments_level:
                comments_level = 0
        elif not comments_level and page.is_own_statement(element, explicit):
            yield _Link(element.get("href").strip(), (page.statement(element), *_labels(element)))


def _labels(link: Any) -> tuple[str, ...]:
    """Returns the text of a link, and what the attributes of it and of the elements in it say."""
    attributes = (element.get(name) for element in link.iter("*") for name in LABELS)
    return (_text(link), *filter(None, attributes))


class _Places:
    """The places of the elements of a page: in its own text, in a footer, or in a part about other things.

    A finding about an element is remembered for those inside it.
    """

    def __init__(self) -> None:
        # {element: whether it, or an element around it, is a place of other text; is a footer}, and {block: its text}.
        self._elsewhere: dict[Any, bool] = {}
        self._in_footer: dict[Any, bool] = {}
        self._texts: dict[Any, str] = {}

    def is_own_statement(self, link: Any, explicit: bool) -> bool:
        """Returns True if a link states the license of the page's text."""
        relations = _words(link.get("rel"))
        address = (link.get("href") or "").strip()
        # Advertisers and readers set such links, not the author.
        if not address or relations & {"sponsored", "ugc"}:
            return False
        if explicit:
            is_candidate = "license" in relations
        else:
            is_candidate = expression_of(address) is not None and self._inherits(link, self._in_footer, _is_footer)
        return is_candidate and not self.is_elsewhere(link) and not OTHER_THINGS.search(self.statement(link))

    def is_elsewhere(self, element: Any) -> bool:
        """Returns True if an element is in a place with text that is not the page's own or is about another thing."""
        return self._inherits(element, self._elsewhere, _is_other)

    def _inherits(self, element: Any, known: dict[Any, bool], holds: Callable[[Any], bool]) -> bool:
        """Returns True if `holds` for an element or one around it, up to the body of the page.

        `known` has the results for elements, and gets those of the new ones.
        """
        if element is None or element.tag in ("html", "body", "main"):
            return False
        # The parser bounds the depth of elements in each other, and so that of the recursion.
        if element not in known:
            known[element] = self._inherits(element.getparent(), known, holds) or holds(element)
        return known[element]

    def statement(self, link: Any) -> str:
        """Returns the text of the block around a link, or of the link alone if the block is a long text."""
        block = next((around for around in link.iterancestors() if around.tag not in _INLINE), link)
        if block not in self._texts:
            self._texts[block] = _text(block)
        text = self._texts[block]
        return text if len(text) <= LONGEST_STATEMENT else _text(link)


def _is_footer(element: Any) -> bool:
    return element.tag == "footer" or bool(_places(element) & FOOTER_PLACES)


def _is_other(element: Any) -> bool:
    types = {kind.rsplit("/", 1)[-1] for kind in (element.get("itemtype") or "").split()}
    other_types = types - TEXT_TYPES - PAGE_PARTS
    is_other_place = element.tag in OTHER_ELEMENTS or _places(element) & OTHER_PLACES
    return bool(is_other_place or other_types or element.get("about"))


def _places(element: Any) -> set[str]:
    """Returns the words of the class, id, role, label and property of an element, in lower case.

    Names that describe the layout, such as has-sidebar and comments-open, are left out.
    """
    names = " ".join(element.get(key) or "" for key in ("class", "id", "role", "aria-label", "itemprop")).split()
    places: set[str] = set()
    for name in names:
        separated = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)  # camelCase
        words = re.findall(r"[a-z]+", separated.lower())
        if words and words[0] not in _LAYOUT and words[-1] not in _LAYOUT:
            places.update(words)
    return places


def _text(element: Any) -> str:
    return " ".join(element.text_content().split())


def _words(value: str | None) -> set[str]:
    return set((value or "").lower().split())


def _is_copy(tree: Any, url: str) -> bool:
    """Returns True if a page says that it is a copy of a page of another site."""
    site = site_of(url)
    addresses = [element.get("href") for element in tree.iter("link") if "canonical" in _words(element.get("rel"))]
    for element in tree.iter("meta"):
        if (element.get("property") or element.get("name") or "").lower() in ORIGINALS:
            addresses.append(element.get("content"))
    originals = {site_of(urljoin(url, address.strip())) for address in addresses if address}
    return bool(site and originals - {site, ""})


def site_of(url: str) -> str:
    """Returns the registrable domain of an address, by the public suffix list.

    An IP address stands for itself. Of a host without such a domain, it is the last two labels; "" without a host.
    """
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return ""
    parts = _extractor()(host)
    if parts.ipv4 or parts.ipv6:
        return host
    domain: str = parts.top_domain_under_public_suffix
    return domain or ".".join(host.split(".")[-2:])


@cache
def _extractor() -> Any:
    import tldextract

    # Without addresses of lists, the one in the package is used, and nothing is downloaded.
    return tldextract.TLDExtract(cache_dir=None, suffix_list_urls=(), include_psl_private_domains=True)
