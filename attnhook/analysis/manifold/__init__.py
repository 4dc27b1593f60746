"""Discovery: the kinds of attention that a store holds, as clusters on a map, found again for new fingerprints.

`run` has the stages from a store to a folder of artifacts, `model` places fingerprints on the map that they leave.
"""
