import pytest
import subjects


@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
    """Where bases of adapters lie."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="session", params=subjects.SUBJECTS)
def subject(request, scratch):
    return subjects.SUBJECTS[request.param](scratch / request.param)


@pytest.fixture(scope="session")
def adapter(scratch):
    return subjects.adapter(scratch / "adapter")


@pytest.fixture(scope="session")
def model(scratch):
    return subjects.model(scratch / "model")
