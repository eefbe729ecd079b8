"""The comparisons of inversion methods and of domains: one protocol, the same pictures for all.

inversion.py: the table of the methods. chains.py: what is compared. scoring.py: what is measured of
a finished run, with faces.py (whose face, what an edit did) and costs.py (parameters, time, bytes).
claims.py: what the papers say against what was measured. table.py, figures.py: how it is shown.
domains.py: the table of adaptation, with adaptation.py (what is measured), edits.py (what bundled
directions do) and adaptation_page.py.
"""
