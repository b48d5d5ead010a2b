"""The bundle of standards: documents about a release in the forms that others read, in `evidence/standards/`.

Each is computed from the published files by one function of `bundle.DOCUMENTS`, so `verify` repeats it. What no file
can tell is the maker's statement (`release.maker` of the recipe), and is marked as such.
"""
