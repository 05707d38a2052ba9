"""The examples' tests import transformers, which looks for the package `datasets`."""

import sys

# The built-in data lie in ./datasets, and the working folder is on the path: that folder is not the package. It is not
# installed, and None says so.
sys.modules.setdefault("datasets", None)
