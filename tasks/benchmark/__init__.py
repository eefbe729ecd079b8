"""The comparison of inversion methods: one protocol, the same pictures for all.

chains.py: what is compared. scoring.py: what is measured of a finished run, with faces.py (whose
face, what an edit did) and costs.py (parameters, time, bytes). claims.py: what the papers say
against what was measured. table.py, figures.py: how it is shown.
"""
