"""`python substitute_module.py MODULE,ARG,... ARGUMENTS`: run python with `dist_llm` replaced by MODULE,ARG,..."""

import os
import sys

replacement, *arguments = sys.argv[1:]
index = arguments.index("dist_llm")
arguments[index : index + 1] = replacement.split(",")
os.execv(sys.executable, [sys.executable, *arguments])
