"""Conversion from and to Hugging Face folders."""

from moejax.convert.folder import HfSource, convert_folder, from_hf, load, to_hf

__all__ = ['HfSource', 'convert_folder', 'from_hf', 'load', 'to_hf']
