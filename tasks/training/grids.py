"""Picture grids as PNG files."""

from models.pictures import save_grid as save_grid
from models.pictures import to_bytes as to_bytes
