"""pSp: one forward pass of an encoder that finds every row of w+ by itself (arXiv 2008.00951)."""

from models.inversion.e4e import E4e


class Psp(E4e):
    """Codes of pictures in one forward pass, without e4e's ties between the rows.

    It reads every file that `e4e` reads; what differs is the bundled one.
    """

    name = "psp"
    summary = "one forward pass of an encoder to w+, rows untied (pSp, arXiv 2008.00951)"
