"""`python substitute_module.py MODULE,ARGUMENT,... ARGUMENTS`: run python with `dist_llm` replaced by the given
arguments."""

import os
import sys

replacement, *arguments = sys.argv[1:]
index = arguments.index("dist_llm")
arguments[index : index + 1] = replacement.split(",")
os.execv(sys.executable, [sys.executable, *arguments])
