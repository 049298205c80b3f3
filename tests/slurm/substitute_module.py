"""Run Python with another module in place of `dist_llm`: `python substitute_module.py MODULE,ARG,... ARGUMENTS`.

In ARGUMENTS, which are those of a Python command, the word `dist_llm` is replaced by MODULE ARG ...
"""

import os
import sys

replacement, *arguments = sys.argv[1:]
index = arguments.index("dist_llm")
arguments[index : index + 1] = replacement.split(",")
os.execv(sys.executable, [sys.executable, *arguments])
