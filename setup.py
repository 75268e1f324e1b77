"""What pyproject.toml cannot say: a two-line library that is built where a compiler is there, see dynarep/mkl.py."""

from setuptools import Extension, setup

setup(ext_modules=[Extension("dynarep._mkl", ["src/dynarep/_mkl.c"], optional=True)])
