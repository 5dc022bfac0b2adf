"""Virtual environments, by everyone who makes them: venv of every Python found, virtualenv, uv."""
