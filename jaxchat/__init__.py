"""jaxchat: a language model from raw text to a chat page, in JAX."""

from pathlib import Path

__version__ = "0.2.0"
PACKAGE = Path(__file__).resolve().parent
# Where launch.py, configs/, train/ and serve/ are: beside this package in a clone, in jaxchat_app/ once installed.
INSTALLED = PACKAGE.with_name("jaxchat_app").is_dir()
ROOT = PACKAGE.with_name("jaxchat_app") if INSTALLED else PACKAGE.parent
