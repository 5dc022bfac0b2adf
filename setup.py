"""Packaging: one module, one command."""

import os
import re

from setuptools import setup

HERE = os.path.dirname(os.path.abspath(__file__))


def text_of(name: str) -> str:
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()


version = re.search(r'^__version__ = "(.+)"$', text_of("envkernel.py"), re.M)
assert version, "envkernel.py has no __version__"

setup(
    name="envkernel",
    version=version.group(1),
    description="Make Jupyter kernels run in environments, under modules, in containers and on cluster nodes",
    long_description=text_of("README.md"),
    long_description_content_type="text/markdown",
    license="MIT",
    py_modules=["envkernel"],
    python_requires=">=3.8",
    install_requires=["jupyter_client"],
    extras_require={"yarn": ["skein"]},
    entry_points={"console_scripts": ["envkernel=envkernel:command"]},
)
