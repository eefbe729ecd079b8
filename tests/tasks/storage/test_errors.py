"""Each refusal of a server has its reason and its next step."""

import pytest
from botocore.exceptions import ClientError
from s3fs.errors import translate_boto_error

from pipeline.faults import is_refused
from tasks.storage.errors import explain


def refused(code: str) -> OSError:
    """As s3fs raises it."""
    error = ClientError({"Error": {"Code": code, "Message": "no"}}, "GetObject")
    return translate_boto_error(error)


@pytest.mark.parametrize("code", ["ExpiredToken", "RequestExpired", "TokenRefreshRequired"])
def test_expired_credentials_are_to_be_renewed(code: str) -> None:
    said = explain(refused(code), "s3://bucket/x")
    assert said is not None
    assert said.startswith(f"the credentials have expired ({code}). Renew them")
    assert "policy" not in said
    assert is_refused(refused(code))


def test_a_refused_object_is_a_matter_of_policy() -> None:
    said = explain(refused("AccessDenied"), "s3://bucket/x")
    assert said is not None
    assert "bucket policy" in said
    assert not is_refused(refused("AccessDenied"))


@pytest.mark.parametrize("code", ["400", "403"])
def test_head_requests_are_refused_without_a_reason(code: str) -> None:
    """Which is how a server answers to credentials that have expired."""
    said = explain(refused(code), "s3://bucket/x")
    assert said is not None
    assert said.startswith(f"permission denied ({code}), without a reason")
    assert "expired (AWS_SESSION_TOKEN)" in said
