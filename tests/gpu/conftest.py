"""GPU tests are asked for: `pytest -m gpu`. They need torch and a device, and fail where there is none."""


def pytest_ignore_collect(collection_path, config):
    """Nothing here is imported for other runs, which may have no torch."""
    asked = config.getoption("markexpr")
    if "gpu" not in asked or "not gpu" in asked:
        return True
    return None
