"""The encoded pictures of one shard, whatever kind of input it comes from."""

from collections.abc import Callable, Iterator

from tasks.input.files import read_files
from tasks.input.parquet import read_parquet
from tasks.input.sample import RawSample as RawSample
from tasks.input.tar import read_tar
from tasks.job import InputConfig, ShardSpec

READERS: dict[str, Callable[[ShardSpec, InputConfig], Iterator[RawSample]]] = {
    "files": read_files,
    "tar": read_tar,
    "parquet": read_parquet,
}
"""By `ShardSpec.kind`."""


def read_shard(spec: ShardSpec, input: InputConfig) -> Iterator[RawSample]:
    """Samples in the input's order, streaming; a sample that cannot be read carries its error.

    Raises:
        ShardError: the shard as a whole cannot be read (corrupt or missing file, storage).
    """
    return READERS[spec.kind](spec, input)
