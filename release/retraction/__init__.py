"""`atom retract`: takes documents of a published release back, and leaves a tombstone."""

from release.retraction.report import text
from release.retraction.requested import deny_list_of
from release.retraction.retract import Retraction, retract, settle

__all__ = ["Retraction", "deny_list_of", "retract", "settle", "text"]
