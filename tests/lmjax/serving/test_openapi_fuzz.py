"""Requests that schemathesis makes from the server's own description: right, wrong, and at edges.

No response is of status 5xx, each has a status, a type and a form that the description has, and a
key is asked for.
"""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from lmjax.serving.openapi import POSTS
from tests.lmjax.serving.servers import KEY, served

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
from schemathesis import checks  # noqa: E402

HEADERS = {"Authorization": f"Bearer {KEY}"}
NOT_HERE = ("/v1/fill", "/v1/models/{name}")  # no blanks, and no model of a random name
FEW = 40  # requests of each address and mode; of a few addresses most are refused


@pytest.fixture(scope="module")
def server():
    with served(queue=4) as server:
        yield server


@pytest.fixture(scope="module")
def description(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def statuses(operation, mode):
    """Asks an address with made requests, and returns the statuses of the responses."""
    found = set()
    names = ["not_a_server_error", "status_code_conformance", "content_type_conformance"]
    wanted = checks.CHECKS.get_by_names([*names, "response_schema_conformance"])

    @settings(
        max_examples=FEW,
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        response = case.call(headers=HEADERS)
        case.validate_response(response, checks=wanted, headers=HEADERS)
        found.add(response.status_code)

    ask()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_made_requests_are_answered_as_described(server, description, mode):
    """Only a request with a body can be made wrong."""
    operations = [result.ok() for result in description.get_all_operations()]
    kind, found = schemathesis.GenerationMode[mode], {}
    for operation in operations:
        if operation.method == "post" or mode == "POSITIVE":
            found[operation.path] = statuses(operation, kind)
    server.wait_idle()
    posts = {path: found[path] for path in POSTS}
    if mode == "NEGATIVE":
        assert all(400 in one for one in posts.values()), posts
    else:
        assert all(200 in one for path, one in found.items() if path not in NOT_HERE), found
