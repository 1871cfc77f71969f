"""What the tests of the engine share."""

import pytest


@pytest.fixture
def safe_checkpoints():
    """mmengine loads and saves checkpoints as ours say, and afterwards as it did before."""
    from mmdcn.engine import checkpoint

    was_installed = checkpoint.installed()
    checkpoint.install()
    yield
    if not was_installed:
        checkpoint.uninstall()
