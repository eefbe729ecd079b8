"""What a TIFF's header says that Pillow does not pass on."""

import struct

TILE_WIDTH, TILE_LENGTH = 322, 323
_LAYOUTS = {42: ("I", 4, "H", 2, 12, 8), 43: ("Q", 8, "Q", 8, 20, 12)}
"""Of a TIFF and a BigTIFF: the offset's type and place, the count's type and length, an entry's
length, and where in it its value is."""
_VALUES = {3: "H", 4: "I", 16: "Q"}


def tile_pixels(data: bytes) -> int:
    """Pixels of a tile of the first directory, 0 without tiles; a decoder unpacks whole ones,
    however small the picture. Where an entry stands twice libtiff takes the first and Pillow the
    last, so the largest counts.

    Raises:
        ValueError, struct.error: the header is damaged.
    """
    order = "<" if data[:2] == b"II" else ">"

    def value(kind: str, at: int) -> int:
        return struct.unpack_from(order + kind, data, at)[0]

    word, start, counter, length, step, place = _LAYOUTS.get(value("H", 2), _LAYOUTS[42])
    directory = value(word, start)
    sides = {TILE_WIDTH: 0, TILE_LENGTH: 0}
    for index in range(value(counter, directory)):
        entry = directory + length + index * step
        tag, kind = value("H", entry), value("H", entry + 2)
        if tag not in sides:
            continue
        if kind not in _VALUES or (kind == 16 and step == 12):
            raise ValueError(f"the side of a tile is of type {kind}")
        sides[tag] = max(sides[tag], value(_VALUES[kind], entry + place))
    return sides[TILE_WIDTH] * sides[TILE_LENGTH]
