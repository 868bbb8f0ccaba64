from tests.models.conftest import folder  # noqa: F401 - a small model folder for these tests too
