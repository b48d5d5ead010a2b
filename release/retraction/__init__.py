"""`atom retract`: takes documents of a published release back, and leaves a tombstone."""

from release.retraction.retract import Retraction, retract, settle, text
from release.retraction.rewrite import deny_list_of

__all__ = ["Retraction", "deny_list_of", "retract", "settle", "text"]
