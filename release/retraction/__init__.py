"""`atom retract`: takes documents of a published release back, and leaves a tombstone."""

from release.retraction.documents import deny_list_of
from release.retraction.retract import Retraction, retract, settle, text

__all__ = ["Retraction", "deny_list_of", "retract", "settle", "text"]
