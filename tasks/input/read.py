"""The encoded pictures of one shard, whatever kind of input it comes from."""

from collections.abc import Iterator

from tasks.input.files import read_files
from tasks.input.parquet import read_parquet
from tasks.input.sample import RawSample as RawSample
from tasks.input.tar import read_tar
from tasks.job import InputConfig, ShardSpec


def read_shard(spec: ShardSpec, input: InputConfig) -> Iterator[RawSample]:
    """Samples in the input's order, streaming; a sample that cannot be read carries its error.

    Raises:
        ShardError: the shard as a whole cannot be read (corrupt or missing file, storage).
    """
    if spec.kind == "files":
        return read_files(spec)
    if spec.kind == "tar":
        return read_tar(spec, input)
    return read_parquet(spec, input)
