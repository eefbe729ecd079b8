"""What went wrong in storage, in one sentence that says what to do.

Local files, s3fs, botocore and aiohttp each fail in their own words. `storage_errors` turns all of
them into the project's error tree, and lets bugs (TypeError, KeyError, ...) through untouched.
"""

import asyncio
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.errors import RefineryError, ShardError

EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
"""Codes with which a server says that the caller's credentials were good once."""
BAD_CREDENTIALS = EXPIRED | {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidClientTokenId",
    "InvalidToken",
    "AuthFailure",
    "UnrecognizedClientException",
    "RequestTimeTooSkewed",
}
"""Codes with which a server refuses the caller, whatever the object."""
FOREIGN_MODULES = ("botocore", "aiobotocore", "aiohttp", "s3fs")


@contextmanager
def storage_errors(
    action: str, uri: str, error: type[RefineryError] = ShardError
) -> Iterator[None]:
    """Raise what storage raises inside as `error`: "cannot <action> <uri>: <why>. <next step>".

    The original exception stays reachable as `__cause__`.
    """
    try:
        yield
    except RefineryError:
        raise
    except Exception as problem:
        why = explain(problem, uri)
        if why is None:
            raise
        raise error(f"cannot {action} {uri}: {why}") from problem


def explain(problem: BaseException, uri: str) -> str | None:
    """The reason and the next step, or None where the exception is not storage's."""
    code = error_code(problem)
    if code in EXPIRED:
        return (
            f"the credentials have expired ({code}). Renew them (AWS_SESSION_TOKEN, or log in with "
            "the profile again), then run again: what is committed is kept"
        )
    if code in BAD_CREDENTIALS:
        return (
            f"the server refused the credentials ({code}). Check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or the profile named by AWS_PROFILE"
        )
    if code == "NoSuchBucket":
        return (
            f"the bucket {bucket_of(uri)!r} does not exist{_at_endpoint()}. "
            "Check the name and AWS_ENDPOINT_URL, or create the bucket"
        )
    name = type(problem).__name__
    if name in ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"):
        return (
            f"no usable credentials ({problem}). Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or AWS_PROFILE"
        )
    if name == "ProfileNotFound":
        return f"{problem}. Set AWS_PROFILE to a profile of ~/.aws/config, or unset it"
    if is_unreachable(problem):
        return (
            f"the server does not answer{_at_endpoint()} ({name}: {problem}). "
            "Check AWS_ENDPOINT_URL and the network, then run again"
        )
    if code in ("400", "403"):
        return (
            f"permission denied ({code}), without a reason, as servers answer where they send no "
            "body. The credentials may be wrong, or have expired (AWS_SESSION_TOKEN); else it is "
            "the bucket policy"
        )
    if isinstance(problem, OSError):
        return _explain_os_error(problem, uri)
    if type(problem).__module__.split(".")[0] in FOREIGN_MODULES:
        return f"{name}: {problem}. Check the URL, AWS_ENDPOINT_URL and the credentials"
    return None


def error_code(problem: BaseException | None) -> str:
    """The object store's own error code, found along the chain of causes, or ""."""
    while problem is not None:
        response = getattr(problem, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        problem = problem.__cause__
    return ""


def is_unreachable(problem: BaseException) -> bool:
    """Whether the server could not be talked to at all, so that a later try may succeed."""
    if isinstance(problem, TimeoutError | ConnectionError | asyncio.TimeoutError):
        return True
    if isinstance(problem, OSError) and problem.errno in (errno.ESTALE, errno.ETIMEDOUT):
        return True
    module, name = type(problem).__module__.split(".")[0], type(problem).__name__
    return module == "aiohttp" or (
        module in FOREIGN_MODULES
        and ("Connect" in name or "Timeout" in name or "HTTPClient" in name)
    )


def is_missing(problem: BaseException) -> bool:
    """Whether one object is absent although its bucket is there."""
    return isinstance(problem, FileNotFoundError) and error_code(problem) != "NoSuchBucket"


def bucket_of(uri: str) -> str:
    """The bucket of an s3:// URL; the first path component otherwise."""
    return uri.split("://", 1)[-1].split("/", 1)[0]


def _explain_os_error(problem: OSError, uri: str) -> str:
    if problem.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full{_free_space(problem.filename or uri)}. Free space there or choose "
            "another folder, then run again: committed shards are kept"
        )
    if isinstance(problem, FileNotFoundError):
        return "there is no such file or folder. Check the spelling"
    if isinstance(problem, PermissionError) or problem.errno == errno.EROFS:
        code = error_code(problem)
        return (
            f"permission denied{f' ({code})' if code else ''}. Check the owner and mode of the "
            "folder, or the bucket policy and credentials"
        )
    if isinstance(problem, IsADirectoryError):
        return "this is a folder; a file was expected"
    if isinstance(problem, NotADirectoryError | FileExistsError):
        return "a file stands where a folder was expected"
    code = error_code(problem)
    return f"{code + ': ' if code else ''}{problem}. If it is a passing fault, run again"


def _at_endpoint() -> str:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return f" at {endpoint}" if endpoint else ""


def _free_space(path: str) -> str:
    """The free space of the disk below `path`, in words; "" for what is not on a local disk."""
    folder = Path(os.fsdecode(path)).absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    if "://" in str(path):
        return ""
    usage = shutil.disk_usage(folder)
    return f" ({usage.free / 2**20:.0f} MiB free of {usage.total / 2**30:.1f} GiB below {folder})"
