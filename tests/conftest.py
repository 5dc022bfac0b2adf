"""What all tests share."""

pytest_plugins: list[str] = []
