"""How a process of ours comes up quickly."""

import sys
from importlib.abc import MetaPathFinder


class _NoPandas(MetaPathFinder):
    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name)


def spare_pandas() -> None:
    """For a process whose tables are Arrow's: pyarrow, once it is given a list, loads pandas
    to know whether it is one of its own, which takes longer than most questions. It asks once; who
    wants something of pandas later gets it."""
    import pyarrow

    absent = _NoPandas()
    sys.meta_path.insert(0, absent)
    try:
        pyarrow.array([])
    finally:
        sys.meta_path.remove(absent)
