"""Builds the CPU extension; everything else is in pyproject.toml. Without a compiler it is left out."""

import pathlib

import jaxlib
import setuptools

include = str(pathlib.Path(jaxlib.__file__).parent / 'include')
sources = sorted(str(path) for path in pathlib.Path('kernels_pallas').glob('*/*.cc'))
headers = sorted(str(path) for path in pathlib.Path('kernels_pallas').glob('*/*.h'))
setuptools.setup(
    ext_modules=[
        setuptools.Extension(
            'kernels_pallas._cpu',
            sources=sources,
            depends=headers,
            extra_compile_args=['-isystem', include, '-std=c++17', '-O3', '-g0', '-Wno-psabi'],
            language='c++',
            optional=True,
        )
    ]
)
