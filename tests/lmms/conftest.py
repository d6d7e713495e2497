"""lmms-eval keeps copies of the data sets it reads: not in the user's folders."""

import os
import shutil
import tempfile

import pytest

os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="vtok_lmms_")


@pytest.fixture(autouse=True, scope="session")
def _tidy():
    yield
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
