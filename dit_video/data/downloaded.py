"""Which samples of a shard were fetched, as img2dataset and video2dataset say in each sample's json and in a table beside the tar.

`00000.parquet` beside `00000.tar` has a row for every address that was asked for, fetched or not, with its key and status; so it also
tells which samples the tar ought to hold. It is read where pyarrow is installed (the extra `data`); the json in the tar says the same.
"""

import io
import json
import logging
from collections.abc import Mapping
from itertools import islice

from dit_video.data.errors import BadDataError
from dit_video.data.files import ShardFile, exists, read_ranges, size_of
from dit_video.data.shards import MAX_JSON_BYTES, Member

SUCCESS = "success"
THEIRS = {"key", "status", "error_message"}
"""Both tools write these; a status beside anything else is somebody's own word."""
LOOKED_INTO = 3
MAX_TABLE_BYTES = 2**28

log = logging.getLogger(__name__)


def not_fetched(shard: ShardFile, samples: Mapping[str, Mapping[str, Member]]) -> tuple[set[str], list[str]]:
    """The samples of a shard whose status is not success, and what is wrong with the shard by the table beside it.

    A shard that tells no status has none that was not fetched: a look into its first json members finds that out.
    """
    with_json = (members for members in samples.values() if "json" in members)
    tells = any(_status(shard, members) is not None for members in islice(with_json, LOOKED_INTO))
    table = shard.with_name(shard.name.removesuffix(".tar") + ".parquet")
    # a remote table is a request more, and is asked for only where the samples look like these tools'
    statuses = _statuses_in(table) if (tells or not hasattr(table, "store")) and exists(table) else {}
    missing = [key for key, status in statuses.items() if status == SUCCESS and key not in samples]
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    problems = [f"lacks {missing[0]}{more}, which {table.name} says was fetched"] if missing else []
    if not tells and not statuses:
        return set(), problems
    told = {key: statuses[key] if key in statuses else _status(shard, members) for key, members in samples.items()}
    return {key for key, status in told.items() if status not in (None, SUCCESS)}, problems


def _status(shard: ShardFile, members: Mapping[str, Member]) -> str | None:
    """What the json of a sample says; None where it says nothing, or is not one of these tools'."""
    if "json" not in members or members["json"].size > MAX_JSON_BYTES:
        return None
    try:
        about = json.loads(read_ranges(shard, [(members["json"].offset, members["json"].size)])[0])
    except (ValueError, RecursionError):
        return None
    if not isinstance(about, dict) or not THEIRS <= about.keys() or not isinstance(about["status"], str):
        return None
    return about["status"]


def _statuses_in(table: ShardFile) -> dict[str, str]:
    """Status by key in a table; {} where it has no such columns, or cannot be read."""
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-untyped, import-not-found]
    except ImportError:
        log.info("%s is not read, as pyarrow is not installed: pip install 'dit-video[data]'", table)
        return {}
    try:
        size = size_of(table)
        if size > MAX_TABLE_BYTES:
            return {}
        file = parquet.ParquetFile(io.BytesIO(read_ranges(table, [(0, size)])[0]))
        if not THEIRS <= set(file.schema_arrow.names):
            return {}
        columns = file.read(["key", "status"]).to_pydict()
    except (OSError, ValueError, BadDataError) as error:  # pyarrow's errors are ValueErrors and OSErrors
        log.warning("%s cannot be read (%s); the samples' own json tells what was fetched", table, error)
        return {}
    pairs = zip(columns["key"], columns["status"], strict=True)
    return {key: status for key, status in pairs if isinstance(key, str) and isinstance(status, str)}
