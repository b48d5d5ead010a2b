"""Preregistration: what the runs of smaller recipes say of a run before it is trained, sealed, and its result.

`forecast` has the runs and what follows from them, `sealing` takes them from `$ATOM_HOME` and seals the prediction as
an artifact. The worker writes the digest of a sealed prediction into the record of each start
(`pipeline/launch/attempt.py`), and the release carries prediction, manifest and statement.
"""
